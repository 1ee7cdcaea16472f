"""sd-scripts' and LyCORIS' `network_args`, and what else is of the adapter."""

from __future__ import annotations

from typing import Any

from ldm.interop.sheet import Sheet

ALGOS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "diag-oft": "oft"}
"""LyCORIS' `algo`s that are here."""
_SHARES = ("rank_dropout", "module_dropout")


def read(sheet: Sheet, module: str, arguments: dict[str, str]) -> None:
    """Put what `arguments` and the other keys tell of the adapter into the sheet; what is told is taken out of them."""
    told: dict[str, Any] = {}
    for name in _SHARES:
        if float(arguments.get(name, 0) or 0):
            told[name] = float(arguments[name])
        arguments.pop(name, None)
    if module == "lycoris.kohya":
        told |= _lycoris(sheet, arguments)
    for key, value in told.items():
        sheet.put(f"task.adapter.{key}", value)
    if sheet.has("network_dropout"):
        share = sheet.number("network_dropout")
        if module == "lycoris.kohya" and told.get("algo", "lora") == "lora":
            sheet.keep("network_dropout", "task.adapter.dropout", share)
        elif share and module != "lycoris.kohya":
            sheet.near("network_dropout", "task.adapter.rank_dropout", share,
                       "of ranks, by sample; theirs is of single numbers of the small side")  # fmt: skip
        else:
            sheet.leave("LyCORIS has none of this algo", "network_dropout")
    sheet.leave("0", "network_dropout")
    if sheet.has("network_weights"):
        sheet.keep("network_weights", "task.adapter.start", sheet.text("network_weights"))
    sheet.leave("the rank is that of network_dim, and the file's must be it", "dim_from_weights")
    if norm := sheet.number("scale_weight_norms"):
        sheet.near("scale_weight_norms", "task.adapter.max_norm", norm,
                   "the change is shortened where it is used; theirs shortens the weights after each step")  # fmt: skip
    sheet.leave("off", "scale_weight_norms")


def _lycoris(sheet: Sheet, arguments: dict[str, str]) -> dict[str, Any]:
    name = arguments.pop("algo", "lora").lower()
    told: dict[str, Any] = {"algo": ALGOS.get(name, "lora")}
    if name not in ALGOS:
        sheet.refuse("network_args", f"algo={name}: not here; {', '.join(ALGOS)} are")
    for key, ours, kind in (("factor", "factor", int), ("constraint", "constraint", float)):
        if key in arguments:
            value = kind(arguments.pop(key))
            if told["algo"] == ("lokr" if key == "factor" else "oft"):
                told[ours] = value
    for key, ours in (
        ("decompose_both", "decompose_both"), ("full_matrix", "full_matrix"),
        ("dora_wd", "dora"), ("rs_lora", "rslora"),
    ):  # fmt: skip
        if arguments.pop(key, "False").lower() == "true":
            told[ours] = True
    for key in ("use_tucker", "use_cp", "use_scalar", "train_norm", "rescaled", "unbalanced_factorization"):
        if arguments.get(key, "False").lower() != "true":
            arguments.pop(key, None)
    if arguments.pop("preset", "full") not in ("full", "unet-transformer-only", "attn-mlp"):
        sheet.near("network_module", "", None, "its preset of layers; task.adapter.targets tells them here")
    return told
