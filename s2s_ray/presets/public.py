"""KerasHub's names of sequence-to-sequence presets, and the public Hugging Face repositories with the same weights.

From keras-hub 0.32: models/bart/bart_presets.py, models/t5/t5_presets.py and tools/checkpoint_conversion/.
"""

from typing import Any

# name: (repository, parameters as KerasHub counts them, description)
_BART = {
    "bart_base_en": ("facebook/bart-base", 139_417_344, "6+6 layers, pre-trained on English. For fine-tuning."),
    "bart_large_en": (
        "facebook/bart-large",
        406_287_360,
        "12+12 layers, pre-trained on English. For fine-tuning.",
    ),
    "bart_large_en_cnn": ("facebook/bart-large-cnn", 406_287_360, "BART large that summarises English news."),
}
_T5 = {
    "t5_small_multi": ("google-t5/t5-small", 60_506_624, "6+6 layers; C4 and supervised tasks, some translation."),
    "t5_base_multi": ("google-t5/t5-base", 222_903_552, "12+12 layers; C4 and supervised tasks, some translation."),
    "t5_large_multi": ("google-t5/t5-large", 737_668_096, "24+24 layers; C4 and supervised tasks, some translation."),
    "t5_1.1_small": ("google/t5-v1_1-small", 60_511_616, "8+8 layers, pre-trained on C4. For fine-tuning."),
    "t5_1.1_base": ("google/t5-v1_1-base", 247_577_856, "12+12 layers, pre-trained on C4. For fine-tuning."),
    "t5_1.1_large": ("google/t5-v1_1-large", 750_251_008, "24+24 layers, pre-trained on C4. For fine-tuning."),
    "t5_1.1_xl": ("google/t5-v1_1-xl", 2_849_757_184, "24+24 layers, pre-trained on C4. For fine-tuning."),
    "t5_1.1_xxl": ("google/t5-v1_1-xxl", 11_135_332_352, "24+24 layers, pre-trained on C4. For fine-tuning."),
    "flan_small_multi": ("google/flan-t5-small", 76_961_152, "8+8 layers, fine-tuned to follow instructions."),
    "flan_base_multi": ("google/flan-t5-base", 247_577_856, "12+12 layers, fine-tuned to follow instructions."),
    "flan_large_multi": ("google/flan-t5-large", 783_150_080, "24+24 layers, fine-tuned to follow instructions."),
}

# As KerasHub's `presets`: name to metadata; `path` is the model type.
PUBLIC: dict[str, dict[str, Any]] = {
    name: {"description": description, "params": parameters, "path": family, "handle": f"hf://{repository}"}
    for family, presets in (("bart", _BART), ("t5", _T5))
    for name, (repository, parameters, description) in presets.items()
}
