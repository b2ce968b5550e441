"""Answers: from prompts to new tokens, for one user or many.

May import errors, console, storage, devices, tokenization, tokenizer, data, families and weights. In reading
order:

    options.py               what a caller may ask of generation, checked
    sampling.py              from scores to a token: temperature, top-k, top-p, ...
    logits_processors.py     penalties and prohibitions
    constraints.py           choices, regular expressions, JSON Schema
    output.py                completions, and reports: scores, hidden states, attentions
    sequence.py              a request, the sequences that it becomes, and why they end
    cache.py                 keys and values of the tokens read so far, slot by slot
    inputs_embeds.py         prompts as vectors
    model_runner.py          tokens in, logits out, by PyTorch
    native.py                the same in one call of C (native.c, products.h)
    loop.py                  the decoding loop: decode, prefill, choose
    beam_search.py           sequences that fork
    speculative_decoding.py  guesses, several tokens a step
    api.py                   generate, stream, answer_questions, generate_ids, generate_output
    loading.py               model, tokenizer and assistant, loaded to answer
    generation_config.py     what a model's folder says about its use
    conversation.py          a conversation, and questions in the format of the model
    slash_commands.py        the commands of a conversation: /temperature, /why, ...
    prefix_cache.py          beginnings that prompts share, read once
    cuda_graph.py            a decoding step on memory that never moves
    burst_pipeline.py        keeps a GPU ahead of its host
    request_handle.py        one request to the engine, as its owner sees it
    engine.py                requests that join and leave one loop; a thread that drives it
"""
