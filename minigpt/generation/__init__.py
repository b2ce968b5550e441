"""Generates new tokens from prompts, for one user or many.

Modules in this folder may import only these parts of minigpt: errors, console, storage, devices,
tokenization, tokenizer, data, families, finetuning and weights. In reading order:

    options.py               all options of generation, with their checks
    sampling.py              chooses tokens from logits: temperature, top-k, top-p, ...
    logits_processors.py     penalties and forbidden tokens
    constraints.py           choices, regular expressions, JSON Schema
    output.py                completions, and optional outputs: scores, hidden states, attentions
    sequence.py              a request, its sequences, and their stop reasons
    cache.py                 keys and values of the tokens that the model has read
    inputs_embeds.py         prompts as vectors
    model_runner.py          runs the model with PyTorch: tokens in, logits out
    native.py                runs the model with one call into C code (native.c, products.h)
    packed_weights.py        float32 matrix products of many tokens on a CPU, by oneDNN
    loop.py                  the decoding loop: decode, prefill, choose
    beam_search.py           beam search
    speculative_decoding.py  guesses tokens, so that one step gives several tokens
    api.py                   generate, stream, answer_questions, generate_ids, generate_output
    loading.py               loads model, tokenizer and assistant model
    generation_config.py     reads generation_config.json and the prompt format of a model
    conversation.py          a conversation, and question answering in the model's prompt format
    slash_commands.py        the commands of a conversation: /temperature, /why, ...
    prefix_cache.py          keeps keys and values of beginnings that prompts share
    cuda_graph.py            decodes by CUDA graphs
    burst_pipeline.py        keeps the GPU busy while the CPU processes earlier tokens
    request_handle.py        tokens and result of one request to the engine
    engine.py                serves many requests with one loop, in a thread if wanted
"""
