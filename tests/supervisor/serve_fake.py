"""`tokenmill serve` with the fake engine in the place of vLLM."""

import sys
from pathlib import Path

from tokenmill import cli
from tokenmill.engine.supervisor import plan

if __name__ == "__main__":
    plan.ENGINE_COMMAND = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
