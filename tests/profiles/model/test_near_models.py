"""A folder that holds no model of its own: what to give instead is said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.model.files import locate


@dataclass(frozen=True, kw_only=True)
class Near:
    case: str
    files: tuple[str, ...]
    says: str
    link: str = ""  # a broken one


_MODEL = ("config.json", "tokenizer.json")
NEAR = [
    Near(case="the hub's cache", files=("snapshots/abc/config.json",), says="give {0}/snapshots/abc"),
    Near(case="checkpoints of a run", files=("checkpoint-10/config.json",), says="give {0}/checkpoint-10"),
    Near(case="a GGUF file", files=("a-Q4.gguf",), says="give {0}/a-Q4.gguf"),
    Near(case="GGUF beside a config", files=(*_MODEL, "a.gguf"), says="give {0}/a.gguf"),
    Near(case="DeepSpeed", files=(*_MODEL, "zero_to_fp32.py"), says="zero_to_fp32.py"),
    Near(case="FSDP", files=(*_MODEL, "fsdp_0/__0_0.distcp"), says="merge-weights"),
    Near(
        case="a link to nothing", files=_MODEL, link="model.safetensors", says="model.safetensors is a link"
    ),
    Near(case="a link for a config", files=_MODEL[1:], link="config.json", says="config.json is a link"),
    Near(case="nothing", files=("readme.txt",), says="Give the folder that save_pretrained wrote"),
    Near(case="no weights", files=_MODEL, says="Weights are read from"),
]


@pytest.mark.parametrize("near", NEAR, ids=lambda near: near.case)
def test_what_to_give_instead_is_said(tmp_path: Path, near: Near) -> None:
    folder = tmp_path / "model"
    for name in near.files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    if near.link:
        (folder / near.link).symlink_to("../blobs/abc")

    with pytest.raises(UserError) as error:
        locate(str(folder), for_training=True)
    assert near.says.format(folder) in (error.value.remedy or "")
