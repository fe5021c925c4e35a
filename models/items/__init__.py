"""Models that are no language models: an item goes in (a picture, a text's tokens), tensors come out, nothing is kept.

Such a model comes as an ONNX graph, is cut where little crosses (cuts), and its stages are ONNX graphs again (net).
"""
