"""Coverage-guided fuzzing of what reads bytes that others have written: `make fuzz`.

    targets/NAME.py          one parser: what is called with an input, and what must hold then
    targets/shim.c           the shim, in a simulated kernel
    claims.py                what must hold of every error and every text, whichever target
    mutate.py                changes JSON documents; libFuzzer changes bytes
    child.py                 one fuzzing process, of one target: atheris, which is libFuzzer for Python
    shim.py                  builds and runs the shim's target: libFuzzer, with the sanitizers of clang or gcc
    __main__.py              starts the processes, shows their progress and the table at the end
    tests/fuzz/corpus/NAME/  inputs: a few ordinary ones to begin with, and each that found a fault
    .cache/fuzz/NAME/        corpus/: inputs that reach new code, kept for the next run; findings/: what broke a claim

An input that found a fault is moved into tests/fuzz/corpus when the fault is mended: `make test` replays every file
there (tests/fuzz), without a fuzzer. Must not start the plugin on a network: tests/faults does.
"""
