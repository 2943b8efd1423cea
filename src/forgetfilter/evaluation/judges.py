"""The models that judge answers unless others are named; apart from the measures, so that --help imports little."""

TOXICITY_MODEL = "unitary/unbiased-toxic-roberta"
GUARD_MODEL = "Qwen/Qwen3Guard-Gen-0.6B"
