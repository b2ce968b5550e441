"""The verbs of `minigpt` besides the tutorial's five scripts: parse, call one function, print.

A command may import everything below; nothing imports a command but quickstart, which runs several. In the
order of the work:

    quickstart.py         all of it: from any file to a conversation
    evaluate.py           measure a checkpoint
    doctor.py             what looks wrong with a training run
    chat.py               a conversation in the terminal
    quantize.py           save a checkpoint in fewer bits
    import_checkpoint.py  a .pth of torch.save becomes a checkpoint folder
    convert.py            a checkpoint folder becomes a GGUF file
    environment.py        what is installed, for a bug report
"""
