"""UNets: guidance in one batch, and cross-attention that has an output of its own."""

from ..denoiser.spec import Layout
from .family import Family

UNETS = (
    Family(
        "UNet2DConditionModel",
        "Stable Diffusion (1, 2, XL)",
        pipeline_attribute="unet",
        default_cfg_half="unconditional",
        pipelines_without_callback=(
            "AudioLDMPipeline",
            "MusicLDMPipeline",
            "PaintByExamplePipeline",
            "StableDiffusionAdapterPipeline",
            "StableDiffusionGLIGENPipeline",
            "StableDiffusionImageVariationPipeline",
            "StableDiffusionLatentUpscalePipeline",
            "StableDiffusionUpscalePipeline",
            "StableDiffusionXLAdapterPipeline",
            "StableDiffusionXLInstructPix2PixPipeline",
            "StableUnCLIPImg2ImgPipeline",
            "StableUnCLIPPipeline",
        ),
        # Their unconditional half has no boxes, or no picture.
        conditional_half_pipelines=(
            "StableDiffusionGLIGENPipeline",
            "StableUnCLIPImg2ImgPipeline",
            "StableUnCLIPPipeline",
        ),
    ),
    Family("UNetMotionModel", "AnimateDiff", pipeline_attribute="unet", default_cfg_half="unconditional"),
    Family("UNetSpatioTemporalConditionModel", "Stable Video Diffusion", pipeline_attribute="unet"),
    Family(
        "I2VGenXLUNet",
        "I2VGen-XL",
        Layout(batch_arguments=("fps", "image_latents", "image_embeddings")),
        pipeline_attribute="unet",
        pipelines_without_callback=("I2VGenXLPipeline",),
    ),
    Family(
        "UNet3DConditionModel",
        "text-to-video Stable Diffusion",
        pipeline_attribute="unet",
        pipelines_without_callback=("TextToVideoSDPipeline", "VideoToVideoSDPipeline"),
    ),
    # UNet and control in one. The cross-attention of the control is computed in every step, as that of any ControlNet;
    # the call says in which steps it runs at all.
    Family(
        "UNetControlNetXSModel",
        "ControlNet-XS",
        Layout(batch_arguments=("controlnet_cond",), ungated_layers=("ctrl_",)),
        pipeline_attribute="unet",
    ),
    Family(
        "Kandinsky3UNet",
        "Kandinsky 3",
        Layout(
            # All its layers say that they are cross-attention.
            cross_attention_suffixes=tuple(f"attentions.{place}.attention" for place in range(1, 10)),
            # It pools the text for the embedding of the time.
            ungated_layers=("add_time_condition",),
            scale_offset=1.0,
        ),
        pipeline_attribute="unet",
    ),
    Family(
        "AudioLDM2UNet2DConditionModel",
        "AudioLDM 2",
        # Two texts in turn.
        Layout(batch_arguments=("encoder_hidden_states_1", "encoder_attention_mask_1")),
        pipeline_attribute="unet",
        pipelines_without_callback=("AudioLDM2Pipeline",),
    ),
)
