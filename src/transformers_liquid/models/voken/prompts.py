"""What models with vokens are asked. Strings of MiniGPT-5 (arXiv 2310.02239) are those of its released code
(github.com/eric-ai-lab/MiniGPT-5, `dataloader.py`), which its checkpoints were trained to answer."""

# The three tasks of a scene of a story, after what came before: draw what is told, tell and draw what comes next, tell what
# is drawn. The picture, if any, comes last. MiniGPT-5's.
STORY_PROMPTS = {
    "image": "Generate an image with the scene description: {text}",
    "multimodal": "Tell me the next scene with image.",
    "text": "Tell me the next scene description by this image: ",
}

# Ours: after a picture to describe, and around captions of CC3M that come a second time as an order.
CAPTION_PROMPT = "Describe this picture."
ORDER_PROMPTS = ("draw this for me: {}", "i would like to see {}", "please show me a picture of this: {}")

MINIGPT5_STORY_SYSTEM = (
    "Give the following images in <Img>ImageContent</Img> format. You will be able to see the images once I provide it to "
    "you. Please understanding images and generate story."
)
MINIGPT5_DIALOGUE_SYSTEM = MINIGPT5_STORY_SYSTEM.replace(
    "generate story", "generate conversations with appropriate images"
)
