"""The digital source type of an image: how much of it a generative model has made.

A vocabulary of IPTC (https://cv.iptc.org/newscodes/digitalsourcetype/), used in XMP and in C2PA manifests.
"""

from zcore.request import GenerationRequest

VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATED = f"{VOCABULARY}trainedAlgorithmicMedia"
"""Created by a trained model."""
EDITED = f"{VOCABULARY}compositeWithTrainedAlgorithmicMedia"
"""An existing image, modified by a trained model, such as by inpainting."""


def digital_source_type(request: GenerationRequest) -> str:
    """Return the term for the images of a request: `EDITED` if it starts from an image, else `GENERATED`."""
    return EDITED if request.image is not None else GENERATED
