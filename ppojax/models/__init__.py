"""Models: the decoder, critics, weights in and out, tokenizers. Outside this folder a model is a `ModelDef` and a dict."""
