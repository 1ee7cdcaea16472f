"""What the page's fields say becomes commands that their own parsers take; files stay below the folders."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ldm.cli import edit, finetune, sample
from ldm.cli import studio as verb
from ldm.cli.__main__ import main
from ldm.web.studio import drawing, training
from ldm.web.studio.commands import Commands, captured
from ldm.web.studio.drawing import Form
from ldm.web.studio.places import Places

TRAIN = training.Form(method="lora", images="pics", base="emoji", out="runs/x", steps=40, rate=0.004, batch=2, size=64,
                      rank=4, seed=0, prompts="a cat\n\n a dog ", every=20, noun="cat", word="sks",
                      class_pictures=8)  # fmt: skip
DRAW = Form(model="emoji", prompt=" a red apple ", out="drawn", steps=4, guidance=3.0, seed=7, count=2)


@pytest.mark.parametrize("method", training.METHODS)
def test_trainings_are_commands_that_are_accepted(method):
    form = replace(TRAIN, method=method, word="<cat>" if method == "textual_inversion" else "sks", condition="grey",
                   encoder="clip_emoji", sees="plus", pictures=("a.png", "b.png"),
                   masks=("c.png", "d.png"))  # fmt: skip
    argv = training.command(form)
    args, rest = finetune.parser().parse_known_args(argv[1:])
    assert rest == []
    assert (args.steps, args.batch, args.lr, args.size, args.prompt) == (40, 2, 0.004, 64, ["a cat", "a dog"])
    if training.METHODS[method].rank:
        assert args.rank == 4
    if training.METHODS[method].subject:
        assert (args.noun, args.identifier, args.num_class_images) == ("cat", "sks", 8)
    given = {"controlnet": "conditions", "ip_adapter": "references"}.get(method, "pictures")
    assert list(map(str, getattr(args, given, []))) == (
        ["a.png", "b.png"] if training.takes(method, "pictures") else []
    )
    assert list(map(str, getattr(args, "masks", []))) == (["c.png", "d.png"] if method == "inpaint" else [])
    assert getattr(args, "condition", "grey") == "grey"
    assert (getattr(args, "form", "plus"), getattr(args, "image_encoder", "clip_emoji")) == ("plus", "clip_emoji")


def test_every_method_of_the_command_is_there():
    """And what a ControlNet follows, and an IP-Adapter tells, are the command's own choices."""
    (verbs,) = (a for a in finetune.parser()._actions if a.dest == "method")
    assert {m.words[0] for m in training.METHODS.values()} == set(verbs.choices)
    told = {a.dest: a.choices for method in ("controlnet", "ip-adapter") for a in verbs.choices[method]._actions}
    assert set(training.CONDITIONS.values()) == set(told["condition"])
    assert set(training.SEES.values()) == set(told["form"])


@pytest.mark.parametrize("method", ["controlnet", "ip_adapter"])
def test_the_plan_of_a_method_is_of_its_command(method, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    form = replace(
        TRAIN, method=method, images=str(tmp_path), out=str(tmp_path / "x"), prompts="", encoder="clip_emoji"
    )
    commands = Commands(verb.run)
    config = tmp_path / "c.yaml"
    config.write_text(commands.here([*training.command(form), "--print-config"]).out)
    plan = training.read_plan(commands.here(training.plan_words(config, "cpu")).out)
    assert plan.needs > 10e6
    assert plan.seconds > 0


def test_sample_prompts_have_a_picture_each():
    form = replace(TRAIN, method="inpaint", pictures=("a.png", "b.png"), masks=("c.png",))
    with pytest.raises(ValueError, match="sample prompts: 2, each needs a mask of its own, got 1"):
        training.command(form)
    with pytest.raises(ValueError, match="a picture of its own, got 0"):
        training.command(replace(form, pictures=()))
    assert training.command(replace(form, prompts="", pictures=(), masks=()))


def test_a_subject_needs_its_class():
    with pytest.raises(ValueError, match="what it is"):
        training.command(replace(TRAIN, method="dreambooth_lora", noun=" "))
    assert "--no-prior" in training.command(replace(TRAIN, method="dreambooth", class_pictures=0))


@pytest.mark.parametrize("method", ["lora", "dreambooth", "textual_inversion"])
def test_defaults_are_those_of_the_command(method, tmp_path):
    (tmp_path / "pics").mkdir()
    found = training.defaults(method, "emoji", tmp_path / "pics")
    words = [*training.METHODS[method].words, "--images", str(tmp_path / "pics")]
    words += ["--class", "cat", "--no-prior"] if method == "dreambooth" else []
    from ldm.config.schema import load_run

    config = load_run(finetune.tree(finetune.parser().parse_args(words)))
    assert (found.steps, found.rate) == (config.train.steps, config.train.optim.lr)
    assert found.size == config.data.size
    assert found.rank == (4 if method == "lora" else None)


def test_names():
    assert training.run_name("lora", "my pics", ["my_pics_lora"]) == "my_pics_lora_2"
    assert training.check_name(" a b ") == "a b"
    for wrong in ("", "..", "a/b", ".x"):
        with pytest.raises(ValueError, match="name"):
            training.check_name(wrong)


def test_the_plan_is_read_from_what_the_command_prints():
    parts = {"weights": 1e9, "optimizer": 2e9, "host": 9e9}
    told = {"cluster": {"hardware": {"name": "rtx3060", "memory": 12}}, "chosen": {"parts": parts, "fits": True},
            "point": {"days": 0.5, "drawing": 60.0}, "warnings": ["task.cache: nothing yet", "slow"]}  # fmt: skip
    plan = training.read_plan(json.dumps(told))
    assert (plan.needs, plan.seconds, plan.warnings) == (3e9, 43260.0, ("slow",))
    assert plan.told == [("3 GB", "memory", "of 12 GB"), ("12 h 1 min", "of training", "on rtx3060")]


def test_drawing_is_a_command_that_is_accepted():
    form = replace(DRAW, loras=(("a.safetensors", 0.5),), size=(64, 128), negative="red", embeddings=("e.pt",))
    args = sample.parser().parse_args(drawing.command(form)[1:])
    assert (args.prompts, args.seed, args.count, args.size) == (["a red apple"], 7, 2, [64, 128])
    assert (args.lora, args.embedding, args.negative) == (["a.safetensors:0.5"], ["e.pt"], "red")
    args = edit.parser().parse_args(drawing.command(replace(form, picture="p.png", strength=0.5))[1:])
    assert (args.verb, args.prompt, args.strength, args.lora) == ("img2img", "a red apple", 0.5, ["a.safetensors:0.5"])
    args = edit.parser().parse_args(drawing.command(replace(form, picture="p.png", mask="m.png"))[1:])
    assert (args.verb, str(args.mask)) == ("inpaint", "m.png")
    assert "--count" in drawing.command(replace(DRAW, count=1), "--index", "0")


@pytest.mark.parametrize(
    ("change", "words"), [({"prompt": " "}, "prompt"), ({"count": 0}, "pictures"), ({"count": 65}, "pictures")]
)
def test_what_cannot_be_drawn_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        drawing.command(replace(DRAW, **change))


def test_grids_vary_what_they_say():
    places, columns = drawing.grid(DRAW, [("guidance", "1, 4"), ("steps", "2, 6, 12")])
    assert columns == 3
    assert [(p.form.guidance, p.form.steps) for p in places] == [(g, s) for g in (1, 4) for s in (2, 6, 12)]
    assert places[4].label == "Guidance 4 · Steps 6"
    assert {(p.form.seed, p.form.count) for p in places} == {(7, 1)}  # the same noise
    places, _ = drawing.grid(DRAW, [("prompt", "a cat, sitting | a dog"), ("", "")])
    assert [p.form.prompt for p in places] == ["a cat, sitting", "a dog"]
    for axes, words in (
        ([("", "")], "choose"), ([("steps", "2, x")], "Steps"), ([("steps", "1"), ("steps", "2")], "twice"),
        ([("seed", ",".join("1" * 65))], "65"), ([("lora", "1")], "no LoRA"), ([("strength", "1")], "no picture"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            drawing.grid(DRAW, axes)


def test_tuned_beside_its_base():
    places = drawing.beside(replace(DRAW, model="runs/cats"), "emoji")
    assert [p.form.model for p in places] == ["emoji", "runs/cats"]
    places = drawing.beside(replace(DRAW, loras=(("a", 1.0),)), "emoji")
    assert [p.form.loras for p in places] == [(), (("a", 1.0),)]
    with pytest.raises(ValueError, match="is a base itself"):
        drawing.beside(DRAW, "emoji")


def test_a_mask_is_what_was_painted():
    layer = Image.new("RGBA", (8, 8))
    assert drawing.mask_of([layer], (8, 8)) is None
    layer.paste((255, 0, 128, 90), (2, 3, 5, 6))
    mask = np.asarray(drawing.mask_of([layer], (8, 8)))
    expected = np.zeros((8, 8))
    expected[3:6, 2:5] = 255
    assert np.array_equal(mask, expected)


def test_files_only_below_the_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("in", "out", "in/pics"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "pics" / "a.png")
    places = Places.of([tmp_path / "in"], tmp_path / "runs", tmp_path / "drawn")
    assert places.pictures() == ["in/pics"]
    assert places.sets() == []
    (tmp_path / "in" / "set").mkdir()
    (tmp_path / "in" / "set" / "manifest.json").write_text("{}")
    assert places.sets() == ["in/set"]
    assert places.file("pics/a.png", "picture") == "in/pics/a.png"
    with pytest.raises(ValueError, match=r"picture 'pics/b\.png': no such file"):
        places.file("pics/b.png", "picture")
    assert places.folder("pics") == places.folder("in/pics/../pics") == tmp_path / "in" / "pics"
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    for outside in ("../out", str(tmp_path / "out"), "/etc", "~", "in/../../x"):
        with pytest.raises(ValueError, match="not below the folders"):
            places.folder(outside)
    for gone in ("none", "link", "in/link"):  # which leads out
        with pytest.raises(ValueError, match="no such folder"):
            places.folder(gone)
    assert places.model("emoji") == "emoji"
    assert places.model("stabilityai/sdxl-turbo") == "stabilityai/sdxl-turbo"  # a hub's
    for outside in ("/etc/x.safetensors", "../x", "~/x/y"):
        with pytest.raises(ValueError, match="not below"):
            places.model(outside)
    assert [places.encoder(told) for told in (None, "clip_emoji", "in/eyes", "open_clip:ViT-B-32:openai")] == [
        "", "clip_emoji", "in/eyes", "open_clip:ViT-B-32:openai",
    ]  # fmt: skip
    for outside in ("/etc/eyes", "/etc:eyes", "open_clip:ViT-B-32:/etc/eyes.pt", "open_clip:ViT-B-32:../x"):
        with pytest.raises(ValueError, match="not below"):
            places.encoder(outside)
    with pytest.raises(ValueError, match="no such folder"):
        Places.of([tmp_path / "none"], tmp_path / "runs", tmp_path / "drawn")


def test_commands_run_here_and_their_mistakes_are_one_line(tmp_path, capsys):
    commands = Commands(verb.run)
    assert commands.here(["sample", "--list-samplers"]).lines[0]
    with pytest.raises(ValueError, match=r"^folder .*no such folder$"):
        commands.here(["data", "check", str(tmp_path / "no")])
    with pytest.raises(ValueError, match=r"--stepz"):
        commands.here(["sample", "a", "--stepz", "4"])
    assert capsys.readouterr() == ("", "")


def test_only_the_thread_that_captures_is_captured(capsys):
    with captured() as (out, _):
        thread = threading.Thread(target=lambda: print("elsewhere"))
        thread.start()
        thread.join()
        print("here")
    assert out.getvalue() == "here\n"
    assert capsys.readouterr().out == "elsewhere\n"


@pytest.mark.parametrize(
    ("argv", "words"), [(["--port", "0"], "--port"), (["--token", "short"], "--token"), (["no-such"], "no-such")]
)
def test_the_verb_names_mistakes(argv, words, capsys, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the extra `web` is not installed")
    monkeypatch.chdir(tmp_path)
    assert main(["studio", *argv]) == 2
    assert words in capsys.readouterr().err


def test_what_is_drawn_again_alone():
    """A picture of `ldm sample` is; an edit, which has its command alone, and a picture of another program are not."""
    assert drawing.whole_only({"prompt": "a cat", "index": 1}) == ""
    assert "edited" in drawing.whole_only({"command": ["edit", "img2img", "a.png", "a cat"]})
    assert "without" in drawing.whole_only({})
