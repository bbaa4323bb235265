"""SEE from the miniature's base model whose scores never said anything of its answers. Tests that
SEE elicits an ability that is there, rather than teaching one (Sec. 4.2)."""

import argparse

import cycle

parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
parser.add_argument("--model", default="models/tiny-0")
base = parser.parse_known_args()[0].model
cycle.main(options=("--model", f"{base}-no-latent"))
