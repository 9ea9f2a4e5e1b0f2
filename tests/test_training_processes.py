"""Several processes train what one would with all of their pictures, and each goes on where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainingcases import draw, short_run, small_pipe

from lycoris_diff import LoraConfig
from lycoris_diff.errors import AdapterError
from lycoris_diff.training import train_dreambooth

HERE = Path(__file__).parent
RUN = """
import json, os, sys
from pathlib import Path
sys.path[:0] = [{here!r}, {root!r}]
from test_training_processes import settings
from trainingcases import short_run, small_pipe
from lycoris_diff.cli.train import is_main_process
from lycoris_diff.training import train_dreambooth

assert is_main_process() == (os.environ["RANK"] == "0")  # the command asks before it makes an Accelerator
pictures, output = Path({pictures!r}), Path({output!r})
first = settings() | dict(train_batch_size=1, checkpoint_every=1, preview_prompts=["a"], preview_steps=1)
train_dreambooth(small_pipe(), short_run(pictures, output, **first))
more = train_dreambooth(small_pipe(), short_run(pictures, output, **first | dict(max_train_steps=3, resume="latest")))
Path({output!r}, os.environ["RANK"]).write_text(json.dumps(more.to_dict()))
"""


def settings():
    """No momentum, and no dropout, which each process has of its own."""
    unet, encoder = LoraConfig(r=2, target_modules=["to_q", "conv1"]), LoraConfig(r=2, target_modules=["q_proj"])
    return {"adapters": {"unet": unet, "text_encoder": encoder}, "optimizer": "torch.optim.SGD", "learning_rate": 1.0}


@pytest.mark.skipif(sys.platform == "win32", reason="torch has no gloo launcher there")
def test_two_processes_train_what_one_does(tmp_path):
    pictures, output = draw(tmp_path / "pictures"), tmp_path / "two"
    script = tmp_path / "run.py"
    script.write_text(RUN.format(here=str(HERE), root=str(HERE.parent), pictures=str(pictures), output=str(output)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    main, other = (json.loads((output / rank).read_text()) for rank in "01")
    assert main["losses"] == other["losses"] and main["resumed_from"] == other["resumed_from"] == 2
    assert main["paths"] and not other["paths"]

    alone = train_dreambooth(small_pipe(), short_run(pictures, tmp_path / "one", max_train_steps=3, **settings()))
    assert main["losses"] == pytest.approx(alone.losses, rel=1e-5)
    for component in ("unet", "text_encoder"):
        together, single = (
            load_file(folder / component / "adapter_model.safetensors") for folder in (output, tmp_path / "one")
        )
        for name, value in single.items():
            torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-5)

    with pytest.raises(AdapterError, match="processes: 2 then, 1 now"):
        train_dreambooth(
            small_pipe(),
            short_run(pictures, output, train_batch_size=1, max_train_steps=4, resume="latest", **settings()),
        )
