"""Training: one loop, from a configuration and data to checkpoints that a resume continues to the same bits.

It may import every folder below it: evaluation, generation, weights, data, families, storage, console.

In reading order:

    config                    every option of a run, and recipes
    loop                      Trainer: the loop
    step                      TrainStep: one step
    loss                      the loss of next-token prediction
    preference_loss           the loss of pairs of answers
    masked_loss               the loss of hidden tokens
    optimizer                 AdamW, Muon, the learning rate's schedule
    mixed_precision           autocast, the loss scale
    activation_checkpointing  less memory for more arithmetic
    run_data                  pairs or plain text, read and encoded
    run_state                 progress, and the JSON part of a checkpoint
    metrics, trackers         what a run logs
    flops                     model FLOPs and a GPU's peak
    checkpoint                checkpoint folders
    checkpointer              saves and loads a run
    non_finite                goes back when numbers are not finite
    stop_request              Ctrl-C and SIGTERM
    distributed, parallel     several processes: messages; DDP and FSDP2
    lock                      one run a folder
    estimate                  time and memory, before a run
    autosize, sizing, measuring  --size: chooses a model for the data and the machine
"""
