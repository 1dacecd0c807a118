"""Seconds and memory of a merge into an ONNX model, beside what it replaces: merge in torch and export again.

    python bench/export_again.py                    # 4 layers of 256
    python bench/export_again.py --hidden 2048 --layers 22 --tokens 32000 --form float16     # 1.1 billion parameters

Needs torch, transformers and peft. The model is Llama's architecture with random weights, the adapter has rank 16 on
all linear layers. Both ways start from what a user has: the one from the torch model and the adapter, the other from
the exported model and the adapter. Each runs in a process of its own; printed are its whole time and its peak memory.
Our merge and `cp` of the exported files take three turns, of which the medians are printed; what was written before is
on the disk before anything is timed.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREPARE = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
folder, hidden, layers, tokens = sys.argv[1], *map(int, sys.argv[2:5])
torch.set_default_dtype(getattr(torch, sys.argv[5]))
torch.manual_seed(0)
config = LlamaConfig(hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
                     vocab_size=tokens, num_attention_heads=max(1, hidden // 64),
                     num_key_value_heads=max(1, hidden // 256))
LlamaForCausalLM(config).save_pretrained(f"{folder}/torch")
model = get_peft_model(LlamaForCausalLM.from_pretrained(f"{folder}/torch", dtype="auto"),
                       LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False))
model.save_pretrained(f"{folder}/adapter")
"""
EXPORT = """
import sys, torch
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
if len(sys.argv) > 3:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, sys.argv[3]).merge_and_unload()
model.config.use_cache = False
class Logits(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.model, self.lm_head = inner.model, inner.lm_head
    def forward(self, ids):
        return self.lm_head(self.model(input_ids=ids, use_cache=False).last_hidden_state)
ids = torch.zeros((1, 8), dtype=torch.int64)
torch.onnx.export(Logits(model), (ids,), sys.argv[2], dynamo=True, external_data=True,
                  input_names=["ids"], output_names=["logits"], verbose=False)
"""
MERGE = """
import sys, loraformat
loraformat.merge(sys.argv[1], [sys.argv[2]], sys.argv[3])
"""
PEAK = "\nimport re; print('peak', re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"


def run(script: str, *arguments: object) -> tuple[float, int]:
    """Return seconds and peak memory in bytes of a script in a process of its own."""
    os.sync()
    start = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-c", script + PEAK, *map(str, arguments)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.search(r"peak (\d+)", result.stdout)
    assert found is not None
    return time.perf_counter() - start, int(found[1]) * 1024


def time_cp(folder: Path) -> float:
    """Return the seconds that `cp` takes for the exported files, into new ones."""
    target = folder / "copy"
    target.mkdir()
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", *map(str, folder.glob("base.onnx*")), str(target)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def time_merge(folder: Path) -> tuple[float, int]:
    """Return the seconds of a merge's process, and its peak memory in bytes."""
    figures = run(MERGE, folder / "base.onnx", folder / "adapter", folder / "merged.onnx")
    for path in folder.glob("merged.onnx*"):
        path.unlink()
    return figures


def main() -> None:
    """Prepare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--form", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: the system's)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        run(PREPARE, folder, arguments.hidden, arguments.layers, arguments.tokens, arguments.form)
        run(EXPORT, folder / "torch", folder / "base.onnx")
        again = run(EXPORT, folder / "torch", folder / "again.onnx", folder / "adapter")
        size = sum(path.stat().st_size for path in folder.glob("base.onnx*"))
        turns = [(time_cp(folder), *time_merge(folder)) for _ in range(3)]
        copied, *ours = (statistics.median(figures) for figures in zip(*turns, strict=True))
    print(f"model                     {size / 1e6:.0f} MB of {arguments.form}")
    print(f"cp                        {copied:.2f} s")
    for label, (seconds, peak) in (("merge in torch and export", again), ("loraformat merge", ours)):
        print(f"{label:25} {seconds:.2f} s, {peak / 1e6:.0f} MB")
    print(f"ratio                     {again[0] / ours[0]:.1f}")


if __name__ == "__main__":
    main()
