"""`python -m cprune`: the same as the console script `cprune`."""

from cprune.run import process

if __name__ == "__main__":
    process()
