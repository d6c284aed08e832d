"""How many layers a checkpoint's networks have, and whether a request names only layers that exist."""

from dataclasses import dataclass
from pathlib import Path

from zcore.checkpoint.files import read_json
from zcore.errors import FieldError, InvalidRequest
from zcore.request import GenerationRequest, each_object


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """The number of main blocks of each network, from its configuration: 30 and 36 in the published checkpoint."""

    transformer: int
    text_encoder: int

    @classmethod
    def of_checkpoint(cls, folder: Path) -> "LayerCounts":
        """Read both configurations. Raises `CheckpointError` naming the file."""
        transformer = read_json(folder / "transformer" / "config.json")
        text_encoder = read_json(folder / "text_encoder" / "config.json")
        return cls(int(transformer["n_layers"]), int(text_encoder["num_hidden_layers"]))

    def check(self, request: GenerationRequest) -> None:
        """Raise `InvalidRequest` if the request skips or reads a layer that the checkpoint does not have."""
        check_layers(request, self.transformer)
        field = "layer_weights" if request.layer_weights else "hidden_layer"
        deepest = min(map(int, request.layer_weights), default=request.hidden_layer)
        if deepest < -self.text_encoder:
            raise InvalidRequest.field(field, missing_layer(deepest, self.text_encoder))


def check_layers(request: GenerationRequest, count: int) -> None:
    """Raise `InvalidRequest` if the request skips a layer that a transformer with `count` main blocks does not have."""
    faults = [
        FieldError(f"{pointer}/layers", f"names layer {max(slg.layers)}; this checkpoint has layers 0 to {count - 1}")
        for pointer, slg in each_object(request.slg, request.passes, "slg")
        if max(slg.layers) >= count
    ]
    if faults:
        raise InvalidRequest(faults)


def missing_layer(layer: int, count: int) -> str:
    """Return the error detail for a hidden layer that a text encoder with `count` blocks does not have."""
    return f"{layer} does not exist; this text encoder has layers -{count} to -1"
