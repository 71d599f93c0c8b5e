"""Quantizes one model with GPTQModel or llm-compressor, inside that program's own environment.

Started by bench/quantizers.py with the rival's interpreter, so it imports nothing of Tokenmill. Prints one JSON line:
version, seconds (loading, quantizing, saving) and the most memory the process held.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def gptqmodel(job: dict[str, Any]) -> str:
    """GPTQ with act-group-aware order, GPTQModel's default, or desc_act."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=4,
        group_size=job["group_size"],
        sym=job["symmetric"],
        desc_act=job["act_order"] == "dynamic",
        device=job["device"],
        offload_to_disk=False,
    )
    model = GPTQModel.load(job["model"], config)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["tokens"]]
    model.quantize(rows, batch_size=1)
    model.save(job["out"])
    return version("gptqmodel")


def llmcompressor(job: dict[str, Any]) -> str:
    """GPTQ with static act-order, llm-compressor's default."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], torch_dtype="auto", device_map=job["device"])
    weights = {"num_bits": 4, "type": "int", "strategy": "group"}
    weights |= {"symmetric": job["symmetric"], "group_size": job["group_size"]}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    oneshot(
        model=model,
        dataset=Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["tokens"]]),
        recipe=GPTQModifier(ignore=["lm_head"], config_groups=groups),
        num_calibration_samples=len(job["tokens"]),
        max_seq_length=len(job["tokens"][0]),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job["out"], save_compressed=True)
    return version("llmcompressor")


def main() -> None:
    """Runs the job in the file named by the second argument with the producer named by the first."""
    job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    start = time.perf_counter()
    producer = {"gptqmodel": gptqmodel, "llmcompressor": llmcompressor}[sys.argv[1]]
    release = producer(job)
    seconds = time.perf_counter() - start
    # Not getrusage: that would count what the parent process held when it forked.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print("RESULT " + json.dumps({"version": release, "seconds": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
