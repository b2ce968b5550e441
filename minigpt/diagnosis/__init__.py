"""What looks wrong with a training run, judged from what the run wrote down, and what to try.

It may import every folder below it: training, evaluation, generation, weights, data, families, storage.

In reading order:

    findings            what can be found: codes, sentences in two languages, causes and consequences
    record              reads what a run wrote down
    checks              its losses
    settings_checks     the setting that held it up
    data_checks         the data that it learned from
    answers             what its best checkpoint does
    curves              reference curves
    advice              the command to try next
    examination         all of it, in one go
    installation        versions, processor, native step, GPU, memory
"""
