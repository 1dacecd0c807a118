"""Of rooms with many members, those that a file is not of stay unimported: a merge starts sooner."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from builders import lora_factors, write_onnx, write_peft, write_tensors

CODE = """
import sys
from pathlib import Path
from loraformat.loading import load_adapter, open_base
from loraformat.encodings import choose_encoding
folder = Path(sys.argv[1])
load_adapter(folder / "adapter"), open_base(folder / "m.onnx"), open_base(folder / "m.safetensors")
assert choose_encoding(open_base(folder / "m.safetensors").list_tensors()[0].dtype) == "plain"
rooms = [name.rsplit(".", 1) for name in sys.modules]
for room in ("schemes", "bases", "encodings"):
    print(*(name for package, name in filter(lambda each: len(each) == 2, rooms) if package == f"loraformat.{room}"))
"""


def test_members_that_are_not_asked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    write_peft(tmp_path / "adapter", {"model.q": lora_factors(rng, 6, 4, 2)})
    write_onnx(tmp_path / "m.onnx", {"model.q": np.ones((3, 2), np.float32)})
    write_tensors(tmp_path / "m.safetensors", {"model.q.weight": np.ones((3, 2), np.float32)})
    code = f"import sys; sys.path[:] = {sys.path!r}\n{CODE}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    schemes, bases, encodings = ({name for name in line.split() if name[0] != "_"} for line in done.stdout.splitlines())
    assert schemes == {"peft"}
    assert bases == {"checkpoint", "onnx_graph"}
    assert encodings == {"plain"}
