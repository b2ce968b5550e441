"""The commands of `minigpt` besides the tutorial's five scripts. Each parses flags, calls a function, prints.

A command may import every other folder. Only quickstart imports other commands, because it runs them. In
the order of the work:

    quickstart.py         does all steps, from any file to a conversation
    classify.py           labels texts with a classifier
    evaluate.py           measures a checkpoint
    look.py               looks inside a model
    plot.py               the curves of runs, and their answers
    experiment.py         runs that fail on purpose
    doctor.py             finds problems of a training run
    chat.py               a conversation in the terminal
    finetune.py           trains a model further on other data, or an adapter for it
    merge.py              merges an adapter into the weights of its model
    quantize.py           saves a checkpoint in fewer bits
    import_checkpoint.py  turns a .pth of torch.save into a checkpoint folder
    convert.py            turns a checkpoint folder into a GGUF or HTML file
    environment.py        prints what is installed, for a bug report
"""
