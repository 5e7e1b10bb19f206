"""torchvision's and timm's architectures, small images, random weights."""

from __future__ import annotations

import torch

from tests.architectures.entry import Entry


def prepare():
    """torchvision beside a CPU-only torch."""
    from ecqx_onnx.quantization.relevance.zennit_import import import_zennit

    import_zennit()


def from_torchvision(name, family="classification", size=64, **options):
    """A model by its name in torchvision."""

    def make():
        prepare()
        import torchvision

        kwargs = {"weights": None, **options}
        if family == "segmentation":
            kwargs["weights_backbone"] = None
        return torchvision.models.get_model(name, **kwargs), torch.randn(2, 3, size, size)

    return Entry(name, f"torchvision, {family}", make)


def built(name, build, size=32):
    """A small one of torchvision's classes."""

    def make():
        prepare()
        import torchvision.models

        return build(torchvision.models), torch.randn(2, 3, size, size)

    return Entry(name, "torchvision, classification", make)


def build_convnext(models):
    setting = models.convnext.CNBlockConfig
    return models.ConvNeXt([setting(24, 48, 1), setting(48, 64, 1), setting(64, None, 1)], 0.1)


def build_swin(models):
    return models.SwinTransformer([4, 4], 24, [1, 2], [2, 2], [4, 4], num_classes=10)


def build_vit(models):
    return models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)


def build_densenet(models):
    return models.DenseNet(8, (2, 2, 2), 16, num_classes=10)


def build_maxvit(models):
    return models.MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=10)


def from_timm(name, size=64, *, told=None, **options):
    """A model by its name in timm. told: what is said of it that does not work yet."""

    def make():
        prepare()
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=10, **options)
        return model, torch.randn(2, 3, size, size)

    return Entry(name, "timm", make, refused=told)


def built_in_timm(name, build, size=32):
    """A small one of timm's classes."""

    def make():
        prepare()
        import timm

        return build(timm), torch.randn(2, 3, size, size)

    return Entry(name, "timm", make)


def build_mixer(timm, block, **options):
    room = timm.models.mlp_mixer
    small = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 32, **options}
    return room.MlpMixer(num_classes=10, block_layer=getattr(room, block), **small)


def build_gmlp(timm):
    from timm.layers import GatedMlp

    return build_mixer(timm, "SpatialGatingBlock", mlp_ratio=4, mlp_layer=GatedMlp)


TORCHVISION = (
    built("ResNet", lambda m: m.ResNet(m.resnet.BasicBlock, [1, 1, 1, 1], 10)),
    built("ResNeXt", lambda m: m.ResNet(m.resnet.Bottleneck, [1, 1, 1, 1], 10, False, 4, 4)),
    from_torchvision("squeezenet1_1"),
    built("DenseNet", build_densenet),
    # Its auxiliary heads run in training alone, and are no part of a file.
    from_torchvision("googlenet", init_weights=False, aux_logits=False),
    from_torchvision("mobilenet_v2"),
    from_torchvision("mobilenet_v3_small"),
    from_torchvision("shufflenet_v2_x0_5"),
    from_torchvision("mnasnet0_5"),
    from_torchvision("efficientnet_b0"),
    from_torchvision("regnet_y_400mf"),
    built("ConvNeXt", build_convnext),
    built("VisionTransformer", build_vit),
    built("SwinTransformer", build_swin),
    built("MaxVit", build_maxvit, 64),
    from_torchvision("lraspp_mobilenet_v3_large", "segmentation"),
)
TIMM = (
    from_timm("vit_tiny_patch16_224", img_size=64, depth=2),
    built_in_timm("MlpMixer", lambda timm: build_mixer(timm, "MixerBlock")),
    built_in_timm("ResMLP", lambda timm: build_mixer(timm, "ResBlock", mlp_ratio=4)),
    built_in_timm("gMLP", build_gmlp),
    built_in_timm("ConvMixer", lambda timm: timm.models.convmixer.ConvMixer(64, 2, 5, 4)),
    # The exporter folds the standardised weight of 4,096 entries, also where it is kept.
    from_timm("test_nfnet", told="not placed: stages.0.0.downsample.conv.weight"),
    from_timm("test_byobnet"),
    from_timm("test_convnext"),
    from_timm("test_vit", img_size=64),
    from_timm("test_mambaout"),
    from_timm("ghostnet_050"),
    from_timm("lcnet_050"),
    from_timm("tinynet_e"),
    from_timm("mobilevit_xxs"),
    from_timm("edgenext_xx_small"),
    from_timm("efficientvit_m0", size=224),
    from_timm("efficientvit_b0"),
    from_timm("test_efficientnet"),
    from_timm("test_vit_relpos", img_size=64),
    from_timm("xcit_nano_12_p16_224", depth=2),
    from_timm("cait_xxs24_224", img_size=64, depth=2),
    from_timm("convit_tiny", img_size=64, depth=2),
    from_timm("dla46_c"),
    from_timm("rexnet_100"),
    from_timm("test_resnet"),
)
