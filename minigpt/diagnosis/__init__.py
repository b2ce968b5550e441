"""Examines the files of a training run, reports problems, and says what to try.

Modules in this folder may import only these parts of minigpt: errors, console, storage, tokenizer, data,
families, weights, generation, evaluation and training.

In reading order:

    findings            all findings: codes, sentences in two languages, causes and consequences
    record              reads the files of a run
    checks              checks the losses
    settings_checks     checks the settings
    data_checks         checks the data
    reward_checks       checks a run that learned from rewards, whose losses are not checked
    answers             checks the answers of the best checkpoint
    curves              compares a run with the losses of another, finished run
    advice              builds the command to try next
    examination         runs all checks
    installation        reports versions, processor, compiled decoding step (native.c), GPU, memory
"""
