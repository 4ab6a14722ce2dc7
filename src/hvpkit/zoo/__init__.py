"""Small models and data to try things on."""

from hvpkit.zoo.absa_nets import c1, c2
from hvpkit.zoo.cifar import cifar10, cifar100
from hvpkit.zoo.digits_problem import digits, digits_cnn
from hvpkit.zoo.perceptron import mlp
from hvpkit.zoo.resnet import cifar_resnet, resnet18_cifar
from hvpkit.zoo.transformer import tiny_gpt, tiny_vit

__all__ = [
    "c1",
    "c2",
    "cifar10",
    "cifar100",
    "cifar_resnet",
    "digits",
    "digits_cnn",
    "mlp",
    "resnet18_cifar",
    "tiny_gpt",
    "tiny_vit",
]
