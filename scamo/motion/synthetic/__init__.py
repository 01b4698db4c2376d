"""The synthetic corpus: procedural motions of thirteen actions with captions, for learning without downloads.

A `Spec` says what a motion does, `generate_clip` moves a body so, `caption` puts it into words, and
`generate_corpus` does it as often as asked. Nothing here knows how motions are measured
(`scamo.evaluation.text_following`), and the measure knows nothing of this.
"""

from scamo.motion.synthetic.captions import CaptionSpec, caption, held_out_wordings
from scamo.motion.synthetic.corpus import (
    SPLITS,
    SyntheticClip,
    corpus_clip,
    generate_clip,
    generate_corpus,
    split_of,
)
from scamo.motion.synthetic.spec import (
    ACTIONS,
    COMBINATIONS,
    HELD_OUT,
    HELD_OUT_PAIRS,
    SLOTS,
    Spec,
    completions,
    is_held_out,
)

__all__ = [
    "ACTIONS",
    "COMBINATIONS",
    "HELD_OUT",
    "HELD_OUT_PAIRS",
    "SLOTS",
    "SPLITS",
    "CaptionSpec",
    "Spec",
    "SyntheticClip",
    "caption",
    "completions",
    "corpus_clip",
    "generate_clip",
    "generate_corpus",
    "held_out_wordings",
    "is_held_out",
    "split_of",
]
