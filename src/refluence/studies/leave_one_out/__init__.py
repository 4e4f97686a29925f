"""Koh & Liang 2017, Figure 2: predicted against actual leave-one-out changes of a test loss."""

from refluence.studies.leave_one_out.convolutional import run_convolutional
from refluence.studies.leave_one_out.network import ConvolutionalOptions
from refluence.studies.leave_one_out.settings import SETTINGS, Options, Setting
from refluence.studies.leave_one_out.study import run

__all__ = ["SETTINGS", "ConvolutionalOptions", "Options", "Setting", "run", "run_convolutional"]
