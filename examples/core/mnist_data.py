"""MNIST through torchvision, with a plain word where it cannot be had."""

import sys


def load_mnist(data_dir):
    """Return MNIST's 60,000 training images, downloaded to ``data_dir`` if need be.

    Ends the script with a message if torchvision cannot be imported, or if the files
    are neither in ``data_dir`` nor to be downloaded.
    """
    try:
        from torchvision.datasets import MNIST
        from torchvision.transforms import ToTensor
    except (ImportError, RuntimeError) as error:
        # A torchvision built for another torch fails with a RuntimeError.
        sys.exit(
            f"This example needs torchvision, which cannot be imported: {error}\n"
            "Install the build that belongs to your torch (https://pytorch.org), or "
            "run examples/quickstart.py, which needs no more than the library."
        )
    try:
        return MNIST(data_dir, download=True, transform=ToTensor())
    except (OSError, RuntimeError) as error:
        sys.exit(
            f"MNIST is not in {data_dir!r} and could not be downloaded: {error}\n"
            "Put its files into the folder MNIST/raw of a directory and name that with "
            "--data-dir, or run examples/quickstart.py, which needs no download."
        )
