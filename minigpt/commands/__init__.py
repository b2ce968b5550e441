"""The commands of `minigpt`. Five more commands, such as train.py, are scripts in the folder above.

Each command parses flags, calls a function, and prints. A command may import from every other folder. Only
quickstart imports other commands, because it runs them. In the order of the work:

    quickstart.py         does all steps, from any file to a conversation
    finetune.py           trains a model further on other data, or an adapter for it
    classify.py           labels texts with a classifier
    evaluate.py           measures a checkpoint
    look.py               looks inside a model
    plot.py               shows the loss curves of training runs
    experiment.py         trains models that fail on purpose
    compare.py            compares two models on the same questions
    doctor.py             finds problems of a training run
    fill.py               fills the [MASK]s of a text
    chat.py               holds a conversation in the terminal
    merge.py              merges an adapter into the weights of its model
    quantize.py           saves a checkpoint in fewer bits
    import_checkpoint.py  turns a .pth of torch.save into a checkpoint folder
    convert.py            turns a checkpoint folder into a GGUF, ONNX or HTML file
    environment.py        prints what is installed, for a bug report
"""
