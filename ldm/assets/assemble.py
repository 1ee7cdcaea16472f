"""Put the shipped models together from finished runs: python ldm/assets/assemble.py [--unet RUN] (not imported by ldm).

`--student EXPORT` only puts a few-step student, a distilled LoRA of `emoji` or `emoji_128`, in its place,
`--ip-adapter EXPORT` an IP-Adapter of `emoji`, `--autoencoder-128 EXPORT` the autoencoder for 128 px, and
`--unet-128 EXPORT` the U-Net for 128 px.

Without --unet the U-Net is random: the frozen parts must be in place, as stored in half precision, before the run that
trains on them. The CLIP stores only what the text encoder of the pipeline's folder does not hold.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from ldm.checkpoint.convert import load_network, save_diffusers
from ldm.checkpoint.folders import read_module, write_module
from ldm.checkpoint.ip_adapter_files import about, open_ip_adapter, save_ip_adapter
from ldm.checkpoint.schedulers import scheduler_to_diffusers
from ldm.checkpoint.students import beside
from ldm.config.schema import load_run
from ldm.models import networks
from ldm.models.shipped import ASSETS, STUDENTS
from ldm.recipes.sources import clip_tower, load_autoencoder
from ldm.recipes.text_to_image import TextToImageTask


def main() -> None:
    """Write `ldm/assets/emoji_64` and `ldm/assets/clip_emoji`, or what an option names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--autoencoder", default="runs/autoencoder_emoji/export")
    parser.add_argument("--clip", default="runs/clip_emoji/export")
    parser.add_argument("--unet", type=Path, help="export of a text-to-image run")
    parser.add_argument("--config", default="configs/train/text_to_image_emoji.yaml")
    parser.add_argument("--student", type=Path, help="export of a distillation as a LoRA")
    parser.add_argument("--ip-adapter", type=Path, help="export of an IP-Adapter of `emoji`")
    parser.add_argument("--autoencoder-128", type=Path, help="export of the autoencoder for 128 px")
    parser.add_argument("--unet-128", type=Path, help="export of a text-to-image run for 128 px")
    args = parser.parse_args()
    if args.unet_128 is not None:
        unet_128(args.unet_128)
        return
    if args.autoencoder_128 is not None:
        plain, weights = read_module(args.autoencoder_128 / "vae")
        config = {"_class_name": "AutoencoderKL", **plain}
        write_module(ASSETS / "emoji_128" / "vae", weights, config, torch.float16)
        shutil.copyfile(args.autoencoder_128.parent / "config.yaml", ASSETS / "made_by" / "autoencoder_emoji_128.yaml")
        report()
        return
    if args.student is not None:
        student(args.student)
        return
    if args.ip_adapter is not None:
        ip_adapter(args.ip_adapter)
        return
    task = load_run(args.config).task
    assert isinstance(task, TextToImageTask)
    assert task.network is not None
    network = networks.build(task.network) if args.unet is None else load_network(args.unet / "unet")
    if args.unet is None:
        autoencoder, tower = load_autoencoder(args.autoencoder), clip_tower(args.clip)
        plain, weights = read_module(Path(args.clip) / "clip")
        config = {"_class_name": "CLIP", "_text": "../emoji_64", **plain}
        shared = {k for k in tower.model.state_dict() if k != "text_projection"}
        own = {k: v for k, v in weights.items() if k not in shared}
        write_module(ASSETS / "clip_emoji", own, config, torch.float16, keep=("bpe.txt.gz", "LICENSE.bpe"))
    else:
        from ldm.recipes.sources import load_towers

        autoencoder, tower = load_autoencoder("emoji"), load_towers("emoji")[0]
    scheduler = scheduler_to_diffusers(task.process.schedule, task.process.prediction)
    folder = ASSETS / "emoji_64"
    save_diffusers(
        folder, network=network, autoencoder=autoencoder, text=[tower], scheduler=scheduler, dtype=torch.float16
    )
    report()


def unet_128(export: Path) -> None:
    """Store the 128 px U-Net in half precision with its scheduler, and its run's config in `made_by`.

    Text encoder and tokenizer are those of `emoji_64` (`ldm.models.shipped.text_home`), which it was trained with.
    """
    plain, weights = read_module(export / "unet")
    folder = ASSETS / "emoji_128"
    write_module(folder / "unet", weights, {"_class_name": "UNet2DConditionModel", **plain}, torch.float16)
    shutil.copytree(export / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    shutil.copyfile(export / "model_index.json", folder / "model_index.json")
    config = export.parent / "config.yaml"
    shutil.copyfile(config, ASSETS / "made_by" / f"{load_run(config).name}.yaml")
    report()


def student(export: Path, folder: Path | None = None) -> None:
    """Copy what a distilled LoRA needs to be a model by itself, and the run's config to `made_by`.

    Raises ValueError for one of another base, or that is no few-step student.
    """
    told = json.loads((export / "adapter.json").read_text(encoding="utf-8"))
    if told["base"] not in STUDENTS:
        raise ValueError(f"{export}: base {told['base']!r} is not one of the shipped {', '.join(STUDENTS)}")
    if beside(export) is None:
        raise ValueError(f"{export}: no scheduler_config.json of a few-step sampler in it")
    folder = folder or ASSETS / STUDENTS[told["base"]]
    folder.mkdir(exist_ok=True)
    for name in ("adapter.json", "scheduler_config.json", *told["loras"]):
        shutil.copyfile(export / name, folder / name)
        (folder / name).chmod(0o644)
    made_by(export, folder)


def ip_adapter(export: Path, folder: Path = ASSETS / "ip_adapter_emoji") -> None:
    """Store an IP-Adapter in half precision, and its run's config in `made_by`.

    Raises ValueError for one of another base or image encoder.
    """
    config, source, file = open_ip_adapter(export)
    told = about(file)
    if told is None or (told.base, told.encoder) != ("emoji", "clip_emoji"):
        raise ValueError(f"{export}: not an IP-Adapter of 'emoji' that sees by 'clip_emoji', but {told}")
    state = {name: source[name].read() for name in source}
    save_ip_adapter(folder, config, state, told, dtype=torch.float16)
    made_by(export, folder)


def made_by(export: Path, folder: Path) -> None:
    """Keep the config of an export's run if its model went to `folder` among the assets."""
    config = export.parent / "config.yaml"
    if config.is_file() and folder.parent == ASSETS:
        shutil.copyfile(config, ASSETS / "made_by" / f"{load_run(config).name}.yaml")
    report()


def report() -> None:
    """Bytes of all stored weights."""
    sizes = {str(p.relative_to(ASSETS)): p.stat().st_size for p in sorted(ASSETS.rglob("*.safetensors"))}
    sys.stdout.write(json.dumps({**sizes, "all": sum(sizes.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
