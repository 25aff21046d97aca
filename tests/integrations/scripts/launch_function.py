"""Starts the training from a launcher that takes a function, as in a notebook."""

import sys

from train import train

from pytorch_accelerated import notebook_launcher

if __name__ == "__main__":
    launcher, folder, port = sys.argv[1:]
    if launcher == "notebook_launcher":
        notebook_launcher(train, args=(folder,), num_processes=2, use_port=port)
    else:
        from accelerate import debug_launcher

        debug_launcher(train, args=(folder,), num_processes=2)
