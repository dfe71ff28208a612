"""What a fused model is: a host, donors with taps, fusers at sites of the host or one mixer behind it.

    layer numbers   how many layers have been run: a tap or site of 12 is the state after the twelfth layer, before the next one
                    and, after the last, before the final norm
    donors          [{"config": its config, cut after the last tap, "taps": [...], "alignment": "map" or "prefix" (streams.py),
                    "map_size": entries of its vocabulary map, 0 where there is none}]
    fusion          {"mode"} and what the mode has of "sites", "rank", "heads", "norm", "dropout" (fusers.py), "weight"
                    (mixers.py). Modes of mixers read a donor's output, so that its one tap is behind its last layer

Files of this package that the model needs at run time import only one another: they are copied beside saved weights, so that
a folder loads without layerfuse (trust_remote_code).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .errors import FusionError
from .fusers import MODES as FUSERS
from .fusers import NORMS, Fuser
from .mixers import MODES as MIXERS
from .mixers import Mixer
from .streams import ALIGNMENTS

MODES: dict[str, type[Fuser] | type[Mixer]] = {**FUSERS, **MIXERS}
DEFAULTS: dict[str, Any] = {
    "mode": "attention", "sites": [], "rank": 256, "heads": 4, "norm": "rms", "dropout": 0.0, "weight": 0.5,
}  # fmt: skip


class FusionConfig(PreTrainedConfig):
    """The config of `FusionForCausalLM`; the host's is `text_config`, where generation and lm-eval look for it.

    Raises:
        FusionError: a mode, norm, tap or site that does not exist, a setting that the mode does not have; heads that do not
            divide the rank.
    """

    model_type = "layerfuse_fusion"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        text_config: Mapping[str, Any] | PreTrainedConfig | None = None,
        donors: Sequence[Mapping[str, Any]] = (),
        fusion: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if text_config is None:
            raise FusionError("a fused model needs the config of its host (text_config), found none")
        self.text_config = AutoConfig.for_model(**text_config) if isinstance(text_config, Mapping) else text_config
        self.donors = [{"alignment": "map", **donor} for donor in donors]
        self.fusion = _checked(fusion or {}, self.text_config.num_hidden_layers)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        for number, donor in enumerate(self.donors):
            depth, alignment = donor["config"]["num_hidden_layers"], donor["alignment"]
            if alignment not in ALIGNMENTS:
                raise FusionError(f"donor {number}: there is no alignment {alignment!r}; there are {', '.join(ALIGNMENTS)}")
            _check_layers(f"donor {number}: tap", donor["taps"], depth)
            if depth != max(donor["taps"]):
                raise FusionError(
                    f"donor {number} has {depth} layers, but none above its last tap {max(donor['taps'])} is of use"
                )
            if self.fuses_outputs and len(donor["taps"]) > 1:
                raise FusionError(
                    f"donor {number}: taps are {donor['taps']}, but mode {self.fusion['mode']} reads its output alone; "
                    f"expected [{depth}]"
                )

    @property
    def fuses_outputs(self) -> bool:
        """Whether distributions are mixed rather than states added; donors have heads then."""
        return self.fusion["mode"] in MIXERS

    def donor_configs(self) -> list[PreTrainedConfig]:
        """The donors' configs as transformers has them."""
        return [AutoConfig.for_model(**donor["config"]) for donor in self.donors]

    def widths(self) -> list[int]:
        """D_k of all taps, donor after donor."""
        return [donor["config"]["hidden_size"] for donor in self.donors for _ in donor["taps"]]


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the mode, those that are given and the defaults of the others.

    Raises:
        FusionError: the mode does not exist, or a setting, or the mode does not have it.
    """
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise FusionError(f"fusion has no {unknown[0]!r}; there are {', '.join(DEFAULTS)}")
    mode = given.get("mode", DEFAULTS["mode"])
    if mode not in MODES:
        raise FusionError(f"there is no mode {mode!r}; there are {', '.join(MODES)}")
    names = ("mode", *MODES[mode].settings)
    if foreign := sorted(set(given) - set(names)):
        settings = ", ".join(names[1:]) or "no settings"
        raise FusionError(f"{foreign[0]!r} does not apply to mode {mode!r}, which has {settings}; leave it out")
    return {name: given.get(name, DEFAULTS[name]) for name in names}


def _checked(given: Mapping[str, Any], layers: int) -> dict[str, Any]:
    fusion = with_defaults(given)
    if fusion["mode"] in FUSERS:
        fusion["sites"] = fusion["sites"] or [layers]
        _check_fusers(fusion, layers)
    elif "weight" in fusion and not _is_share(fusion["weight"]):
        raise FusionError(f"weight is {fusion['weight']!r}; expected a number from 0 to 1")
    return fusion


def _check_fusers(fusion: Mapping[str, Any], layers: int) -> None:
    if fusion["norm"] not in NORMS:
        raise FusionError(f"there is no norm {fusion['norm']!r}; there are {', '.join(NORMS)}")
    _check_layers("site", fusion["sites"], layers)
    for what in ("rank", "heads"):
        if isinstance(fusion[what], bool) or not isinstance(fusion[what], int) or fusion[what] < 1:
            raise FusionError(f"{what} is {fusion[what]!r}; expected a whole number of at least 1")
    if fusion["rank"] % fusion["heads"]:
        raise FusionError(f"{fusion['heads']} heads do not divide a rank of {fusion['rank']}")
    if not _is_share(fusion["dropout"]) or fusion["dropout"] == 1:
        raise FusionError(f"dropout is {fusion['dropout']!r}; expected a number from 0 to below 1")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _check_layers(what: str, numbers: Sequence[int], layers: int) -> None:
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= layers:
            raise FusionError(
                f"{what} {number!r} is outside the model; expected 1 to {layers}, the number of layers that were run"
            )
    if not numbers or list(numbers) != sorted(set(numbers)):
        raise FusionError(f"{what}s are {list(numbers)}; expected different numbers in rising order, at least one")
