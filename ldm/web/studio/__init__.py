"""The studio: pictures, training, watching, drawing and models on one page (`ldm studio`).

What it does is done by commands of `ldm`, which it shows. Modules whose names begin with `tab` know Gradio; the others
do not.
"""
