"""The demo: a picture, one of timm_decor's weights, its five likeliest classes. See README.md."""

import gradio as gr

from timm_decor.inference import demo

# Names for people, and whatever `timm-decor predict` takes: add ("my flowers", "hf-hub:me/resnet18-flowers").
WEIGHTS = demo.choices()

INTRODUCTION = """# timm_decor
Image classifiers that were trained with *decorrelated backpropagation*
([arXiv 2405.02385](https://arxiv.org/abs/2405.02385)) and are ordinary [timm](https://huggingface.co/docs/timm) models
since. See what they know, and what they make of a picture of something else."""

CREDIT = "Flower by vultilion, temple by danielbuechele: CC BY 2.0, from scikit-learn."


def file_of(payload: gr.components.image.ImageData | None) -> str | None:
    """A picture's file as it was uploaded: timm_decor says in one line what is wrong with it, gradio in many."""
    return payload.path if payload else None


with gr.Blocks(title="timm_decor") as app:
    gr.Markdown(INTRODUCTION)
    with gr.Row():
        with gr.Column():
            picture = gr.Image(label="Picture", type="filepath", sources=["upload", "clipboard"], height=280)
            picture.preprocess = file_of
            weights = gr.Dropdown(WEIGHTS, value=WEIGHTS[0][1], label="Weights")
        with gr.Column():
            shares = gr.Label(label="What it says", num_top_classes=demo.TOP)
            problem = gr.Markdown()
            classes = gr.Markdown(demo.about(WEIGHTS[0][1]))
    gr.Examples(demo.examples(), picture)
    gr.Markdown(CREDIT)
    for changed in (picture, weights):
        changed.change(demo.answer, [picture, weights], [shares, problem])
    weights.change(demo.about, weights, classes)

if __name__ == "__main__":
    app.launch(show_error=True, max_file_size="20mb")
