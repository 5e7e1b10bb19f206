"""transformers' architectures: small configurations with random weights, called by name."""

from __future__ import annotations

import torch

from tests.architectures.entry import Entry

TEXT = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {
    **TEXT,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
DECODER = {**ENCODER, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def text():
    ids = torch.randint(3, 99, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pair():
    return {**text(), "decoder_input_ids": text()["input_ids"][:, :6]}


def pixels(size=32):
    return {"pixel_values": torch.randn(2, 3, size, size)}


def sound(length=1600):
    return {"input_values": torch.randn(2, length)}


def from_transformers(model, config, options, example=text, family="text"):
    def make():
        from ecqx_onnx.quantization.relevance.zennit_import import import_zennit

        import_zennit()
        import transformers

        transformers.logging.set_verbosity_error()
        made = getattr(transformers, config)(**options)
        return getattr(transformers, model)(made), example()

    return Entry(model, f"transformers, {family}", make)


def encoder(name, model=None, **options):
    model = model or f"{name}ForSequenceClassification"
    return from_transformers(model, f"{name}Config", {**ENCODER, **options})


def decoder(name, model=None, **options):
    model = model or f"{name}ForCausalLM"
    return from_transformers(model, f"{name}Config", {**DECODER, **options}, family="decoder")


SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 8),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 32,
}
SEQ2SEQ = {
    **TEXT,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
}
TRANSFORMERS = (
    encoder("Bert"),
    encoder("Roberta"),
    encoder("Albert", embedding_size=16),
    encoder("Electra", embedding_size=16),
    encoder("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    encoder("MPNet"),
    encoder("MobileBert", true_hidden_size=32, intra_bottleneck_size=32, embedding_size=16),
    encoder("FNet"),
    from_transformers(
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    ),
    from_transformers(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
        family="decoder",
    ),
    from_transformers(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **TEXT,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 40,
        },
        family="decoder",
    ),
    decoder("GPTNeoX"),
    decoder("OPT", ffn_dim=48, word_embed_proj_dim=32),
    from_transformers(
        "BloomForCausalLM",
        "BloomConfig",
        {**TEXT, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        family="decoder",
    ),
    decoder("Llama"),
    decoder("Mistral"),
    decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    decoder("Qwen2"),
    decoder("Qwen3"),
    decoder("Gemma"),
    decoder("Phi"),
    decoder("StableLm"),
    from_transformers(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **TEXT,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        pair,
        "encoder-decoder",
    ),
    from_transformers(
        "BartForConditionalGeneration", "BartConfig", SEQ2SEQ, pair, "encoder-decoder"
    ),
    from_transformers("ViTForImageClassification", "ViTConfig", IMAGE, pixels, "image"),
    from_transformers("DeiTModel", "DeiTConfig", IMAGE, pixels, "image"),
    from_transformers("BeitForImageClassification", "BeitConfig", IMAGE, pixels, "image"),
    from_transformers(
        "YolosForObjectDetection",
        "YolosConfig",
        {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 5},
        pixels,
        "detection",
    ),
    from_transformers(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        pixels,
        "image",
    ),
    from_transformers(
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        pixels,
        "image",
    ),
    from_transformers(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 16,
        },
        lambda: pixels(64),
        "segmentation",
    ),
    from_transformers("Wav2Vec2ForCTC", "Wav2Vec2Config", SPEECH, sound, "speech, parametrised"),
    from_transformers("HubertModel", "HubertConfig", SPEECH, sound, "speech, parametrised"),
    from_transformers(
        "WhisperModel",
        "WhisperConfig",
        {
            **SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 20,
            "decoder_start_token_id": 1,
        },
        lambda: {
            "input_features": torch.randn(2, 8, 40),
            "decoder_input_ids": text()["input_ids"][:, :6],
        },
        "speech",
    ),
    from_transformers(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**ENCODER, "projection_dim": 16},
            "vision_config": {**IMAGE, "projection_dim": 16},
            "projection_dim": 16,
        },
        lambda: {**text(), **pixels()},
        "image and text",
    ),
    from_transformers(
        "MambaForCausalLM",
        "MambaConfig",
        {**TEXT, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
        lambda: {"input_ids": text()["input_ids"]},
        "state space",
    ),
)
