"""What the lab downloads and builds, in one cache folder; nothing is installed.

    python -m lab.assets                     lists the assets and whether each is there
    python -m lab.assets missing TARGET      lists those that `lab/setup TARGET` has yet to make
    python -m lab.assets make NAME...        makes the files of assets, each unless it is there

cache.py has the folder and what every asset is, debian.py and golang.py get packages and modules, linux.py makes
what QEMU boots. guest.py, hardware.py, programs.py and images.py each have some of the assets.
"""
