"""A training script for launchers; the first process hangs in the second epoch."""

from test_hangs import sleep, train_together

if __name__ == "__main__":
    train_together(process=0, action=sleep)
