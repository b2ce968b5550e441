"""The survival tests: kill training, signal it, damage its files, fill its disk, feed it NaN; then count.

    python -m tests.survival --toy                 # what the tests run: a minute or two on one core
    python -m tests.survival --full --output benchmarks/results/NAME.json
    python -m tests.survival --kills 500 --only kill signal

Every run is the command `minigpt train` with a tiny model. It runs in a fork of this process, which has
imported torch but never computed with it, so a run starts in a tenth of a second. Runs are killed and resumed
in chains: one run is killed again and again until all trials are done. Then it may finish, and its end must
have the same hash as that of the undisturbed run: weights, optimiser, random states, training state, and
metrics (without times).

It prints one row for each promise (trials, and how many held) and one JSON object. The exit code is 1 if a
promise did not hold. The file of --output is written after each row, and keeps the rows of other parts. So
parts can be run one by one, and an interruption costs one row only.

| module | content |
|---|---|
| children.py | starts `minigpt train` in one fork or several, and disturbs it there |
| runs.py | the tiny data set, the flags of a run, the hash of its end |
| bench.py | the table of results, the undisturbed run, chains of disturbed runs |
| interruptions.py | parts kill, signal |
| finetuning.py | part finetune |
| damage.py | parts damage, disk |
| bad_numbers.py | parts numbers, order |
| several.py | parts processes, sharded |
| corpus.py | part corpus: gigabytes of text |
| cost.py | part cost: the time of verification |
"""
