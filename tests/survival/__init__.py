"""Does training survive? Kill it, signal it, damage its files, fill its disk, feed it NaN; then count.

    python -m tests.survival --toy                 # what the tests run: a minute or two on one core
    python -m tests.survival --full --output benchmarks/results/NAME.json
    python -m tests.survival --kills 500 --only kill signal

Every run is `minigpt train` itself, as a command, on a tiny model; each runs in a fork of this process,
which has imported torch but never computed with it, so that starting one takes a tenth of a second. Runs are
killed and resumed in chains: the same run is killed again and again until the count is full, then it may
finish, and must equal, by hash, the run that nobody disturbed: weights, optimiser, random states, training
state, metrics (without the clock's fields).

Printed are one row a promise (trials, how many held) and one JSON object. Exit code 1 if one did not hold.
The file of --output is written after each row, and keeps the rows of other parts that stand in it: parts may
be run one by one, and what interrupts a run costs the row that was being counted.

| module | what |
|---|---|
| children.py | starts `minigpt train` in forks, alone or several; what is done to it in there |
| runs.py | the tiny data set, the flags of a run, its end as a hash |
| bench.py | the table, the undisturbed run, chains of disturbed ones |
| interruptions.py | parts kill, signal |
| finetuning.py | part finetune |
| damage.py | parts damage, disk |
| bad_numbers.py | parts numbers, order |
| several.py | parts processes, sharded |
| corpus.py | part corpus: gigabytes of text |
| cost.py | part cost: what verification takes |
"""
