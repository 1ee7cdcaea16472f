"""LoRAs and embeddings that are loaded into a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.adapters.low_rank import Loras
from ldm.checkpoint.attached import attach_embedding, attach_lora
from ldm.models.network import Network
from ldm.models.text import TextEncoder


class Adapted:
    """The part of a pipeline that others' files change; abstract."""

    network: Network
    text: Sequence[TextEncoder]
    _loras: Loras | None

    def load_lora(
        self, path: str | Path, weight: float = 1.0, *, name: str | None = None, lenient: bool = False
    ) -> str:
        """Merge a LoRA file, a PEFT folder or a run into the weights; the name to change or unload it by.

        Embeddings that the file bundles are added too. Raises ValueError for a file that does not fit this model; with
        `lenient` what does not fit is left out and named, as long as something fits.
        """
        name = Path(path).stem if name is None else name
        return attach_lora(self._merged(), self.network, self.text, path, weight, name, lenient)

    def set_loras(self, weights: Mapping[str, float]) -> None:
        """Change the weights of loaded LoRAs by name; 0 is as without."""
        self._merged().set(weights)

    def unload_loras(self, *names: str) -> None:
        """Take out the LoRAs named, or all; the model's weights are then exactly what they were."""
        self._merged().remove(*names)

    def load_embedding(self, path: str | Path, token: str | None = None) -> list[str]:
        """Teach the towers the tokens of a textual-inversion file (diffusers' or A1111's) or run; what prompts say.

        A file of one token is called by its own name too. `token` renames the only one. Raises ValueError when it does
        not fit, or the token exists.
        """
        return attach_embedding(self.text, path, token)

    def _merged(self) -> Loras:
        if self._loras is None:
            self._loras = Loras(self.network, self.text)
        return self._loras
