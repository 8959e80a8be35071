"""Other systems' configurations, read exactly and said in our words.

`translate(system, arguments)` takes what a user of that system would write on its command line or in its YAML and gives
a `Translation`: our config, where each number came from, what was ignored and why, and what is probably not meant. A
new system is one module with a `Table` and a `translate`. Left out on purpose: running anything.

    cispo explain --like swift --loss_type cispo --epsilon_high 5.0
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from cispo.dialects import huggingface, hydra, miles, nemo_rl, tinker
from cispo.dialects.draft import Translation, band_of
from cispo.dialects.explain import explain, explain_config, of_config, show
from cispo.dialects.tiny import tiny
from cispo.types import ConfigError

TRANSLATORS: dict[str, Callable[[Sequence[str]], Translation]] = {
    "swift": huggingface.translate_swift,
    "trl": huggingface.translate_trl,
    "miles": miles.translate,
    "nemo-rl": nemo_rl.translate,
    "verl": hydra.translate_verl,
    "skyrl": hydra.translate_skyrl,
    "tinker": tinker.translate,
}
SYSTEMS = tuple(TRANSLATORS)


def translate(system: str, arguments: Sequence[str]) -> Translation:
    """`arguments` as `system` reads them. `--section.field value` of ours goes on top.

    Raises ConfigError with all problems together: unknown settings with the nearest known one, contradictory ones named
    together, and what has no equal here.
    """
    if system not in TRANSLATORS:
        near = difflib.get_close_matches(system, SYSTEMS, 1)
        raise ConfigError(
            f"--like {system}: unknown system; choose from {', '.join(SYSTEMS)}"
            + (f" (nearest: {near[0]})" if near else "")
        )
    return TRANSLATORS[system](list(arguments))


__all__ = ["SYSTEMS", "Translation", "band_of", "explain", "explain_config", "of_config", "show", "tiny", "translate"]
