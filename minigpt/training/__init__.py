"""Training: from a configuration and data to checkpoints.

A run that was stopped and resumed gives the same bits as a run that was never stopped.

Modules in this folder may import only these parts of minigpt: errors, console, storage, devices, tokenizer,
tokenization, data, families, finetuning, weights, generation and evaluation.

In reading order:

    config                    all options of a run; recipes
    resolve                   completes the options of the user from a recipe or an earlier run
    finetune_config           the options of fine-tuning
    command                   the commands `train` and `finetune`: from their flags to a run
    run                       one run, from its configuration to its result
    loop                      Trainer: the loop
    step                      TrainStep: one step
    objective                 the model of a run, its trainable parameters, its loss
    loss                      the loss of next-token prediction
    weighted_loss             the loss of next-token prediction with weights for samples
    preference_loss           the loss for pairs of a better and a worse answer
    masked_loss               the loss of predicting hidden tokens
    rewards                   rewards of answers: built in, or from the user's file
    grpo_loss                 the loss of sampled answers with rewards
    distillation_loss         the loss for learning a teacher model's probabilities
    optimizer                 AdamW, Muon, the learning rate's schedule
    mixed_precision           autocast, the loss scale
    activation_checkpointing  less memory for more arithmetic
    run_data                  the data: pairs or plain text, read and encoded
    data_summary              sizes of the data, and losses to compare with
    classification            --task classification: data, loss, files
    pretraining               trains a language model on the texts before the classifier
    run_state                 progress, and the JSON part of a checkpoint
    metrics, trackers         metrics.jsonl, TensorBoard, Weights & Biases
    task_scores               --eval_task: scores of small tasks at each evaluation
    flops                     model FLOPs and a GPU's peak
    checkpoint                checkpoint folders
    model_files               the model in a checkpoint: whole, or an adapter alone
    checkpointer              saves and loads a run
    non_finite                rolls back after NaN or infinity
    stop_request              Ctrl-C and SIGTERM
    distributed, parallel     several processes: communication; DDP and FSDP2
    lock                      at most one run per folder
    estimate                  time and memory, before a run
    autosize, sizing          --size: chooses a model for the data and the machine
"""
