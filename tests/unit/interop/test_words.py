"""Shell scripts as READMEs print them: variables, continuations, notebooks, Windows."""

from __future__ import annotations

import pytest

from ldm.interop.words import read_call

SCRIPT = """#!/bin/bash
# a comment with accelerate launch other.py --no=1
export MODEL_NAME="CompVis/stable-diffusion-v1-4"
export OUTPUT_DIR="path to save model"
cd examples

accelerate launch --mixed_precision="fp16" --num_processes 2 --multi_gpu train_text_to_image.py \\
  --pretrained_model_name_or_path=$MODEL_NAME \\
  --output_dir=${OUTPUT_DIR} \\
  --resolution=512 --center_crop --random_flip \\
  --max_train_steps=15000 \\SPACE
  --validation_prompt "red circle" "cyan circle" \\
  --snr_gamma -1.5 \\
  --lr_scheduler="constant" --lr_warmup_steps=0
""".replace("SPACE", " ")  # a blank behind the backslash, as some have it


def test_a_script_as_a_readme_has_it() -> None:
    call = read_call(SCRIPT, "x.sh")
    assert call.script == "train_text_to_image.py"
    assert call.launcher == {"mixed_precision": "fp16", "num_processes": "2"}
    assert call.options == {
        "pretrained_model_name_or_path": "CompVis/stable-diffusion-v1-4", "output_dir": "path to save model",
        "resolution": "512", "center_crop": True, "random_flip": True, "max_train_steps": "15000",
        "validation_prompt": ["red circle", "cyan circle"], "snr_gamma": "-1.5", "lr_scheduler": "constant",
        "lr_warmup_steps": "0",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "accelerate launch train_db.py \n --a=1 \n --b \n",  # kohya's documents leave the backslashes out
        "accelerate launch train_db.py ^\n --a=1 ^\n --b\n",
        "!accelerate launch train_db.py --a 1 --b",
        'python "C:\\\\kohya\\\\train_db.py" --a=1 --b\n',
    ],
)
def test_other_ways_of_writing_it(text: str) -> None:
    call = read_call(text, "x.sh")
    assert (call.script, call.options) == ("train_db.py", {"a": "1", "b": True})


def test_a_plain_list_of_options() -> None:
    assert read_call("--rank=4\n--learning_rate 1e-4\n", "args.txt").options == {"rank": "4", "learning_rate": "1e-4"}


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"x\.sh: \$DATA is not set in the file"):
        read_call("accelerate launch t.py --train_data_dir=$DATA", "x.sh")
    with pytest.raises(ValueError, match=r"x\.sh: no call of a training script"):
        read_call("echo hello\n", "x.sh")
    with pytest.raises(ValueError, match=r"x\.sh: 'stray' belongs to no option"):
        read_call("accelerate launch t.py stray --a=1", "x.sh")
