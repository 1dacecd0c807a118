"""PEFT's own configurations: every field of theirs is known here, and those that are ignored change no output."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from loraformat.recognition import recognise_type
from loraformat.schemes._peft.fields import NEWEST, OF_LORA
from loraformat.schemes._peft.types import TYPES

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

FIELDS = OF_LORA | {name: row.fields for name, row in TYPES.items()}
OTHERWISE: dict[str, Any] = {
    **dict.fromkeys(("beta1", "beta2", "orth_reg_weight", "d_initial", "init_scale"), 0.37),
    **dict.fromkeys(("init_v_bound", "init_theta_d_bound", "init_vector_bank_bound", "init_logits_std"), 0.37),
    **dict.fromkeys(("random_seed", "generator_seed", "delora_lambda", "qalora_group_size", "proj_seed"), 5),
    **dict.fromkeys(("rank_dropout_scale", "save_only_topk_weights", "runtime_offload_base_weight"), True),
    **dict.fromkeys(("init_ia3_weights", "select_top", "progressbar"), False),
    **{"exclude_modules": ["nowhere"], "megatron_core": "elsewhere", "deltaT": 3},
    "auto_mapping": {"base_model_class": "Elsewhere", "unsloth_fixed": True},
}
"""Values for ignored fields that PEFT takes without tensors of another shape, beside all whose name has "dropout"."""


def list_types() -> list[str]:
    """Return the types of PEFT that are changes of weights."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    names = (each.value for each in PEFT_TYPE_TO_CONFIG_MAPPING)
    return sorted(name for name in names if recognise_type(name) is None)


def test_every_field_of_every_type_is_known() -> None:
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert peft.__version__ == ".".join(map(str, NEWEST)), "read what the newer PEFT has, then move NEWEST"
    assert "LORA" in list_types()
    for peft_type in list_types():
        own = {each.name for each in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type])}
        assert own <= FIELDS[peft_type].heeded | FIELDS[peft_type].ignored, peft_type


def choose() -> dict[str, str]:
    """Return one specimen for each type, by its name."""
    from kind_zoo import SPECIMENS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {name: specimen.make(list(specimen.targets)) for name, specimen in reversed(SPECIMENS.items())}
    return {str(config.peft_type.value): name for name, config in made.items()}


@pytest.mark.parametrize("peft_type", list_types())
def test_what_is_ignored_changes_no_output(peft_type: str, tmp_path: Path) -> None:
    import peft
    import torch
    from kind_zoo import SPECIMENS, Parts, make_inputs, run, train
    from safetensors.torch import load_file

    if peft_type not in choose():
        pytest.skip(f"no specimen of {peft_type}")
    specimen = SPECIMENS[choose()[peft_type]]
    left = train(specimen, tmp_path)
    path = left.folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    altered = {each: OTHERWISE.get(each, 0.25 if "dropout" in each else None) for each in FIELDS[peft_type].ignored}
    altered = {each: value for each, value in altered.items() if value is not None and each in fields}
    if "init_weights" in FIELDS[peft_type].ignored and isinstance(fields.get("init_weights"), bool):
        altered["init_weights"] = not fields["init_weights"]
    assert altered
    path.write_text(json.dumps(fields | altered))
    assert not [problem for problem in loraformat.load(left.folder).problems if problem.code in ("LF240", "LF241")]
    torch.manual_seed(1)
    model = Parts().to(specimen.form)
    model.load_state_dict(load_file(left.base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = (
            peft.PeftModel.from_pretrained(model, left.folder, autocast_adapter_dtype=False).to(specimen.form).eval()
        )
    found = run(again, {name: each for name, each in make_inputs(specimen.form).items() if name in specimen.targets})
    for name, expected in left.unmerged.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, atol=1e-9, err_msg=f"{name}, {sorted(altered)}")
