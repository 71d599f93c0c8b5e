"""What holds for every test of the suite."""

from tokenmill.engine.vllm import isa

# Before any test computes: TOKENMILL_ISA makes the whole suite run as on a machine with less.
isa.narrow()
