"""The losses over pairs: contrastive and sigmoid, on cosines of class tokens and on CMLI."""

from ds_cmli.cmli.loss import MAX_SIGMOID_SCALE, CMLILoss, PairLoss
from ds_cmli.config.schema import LossConfig
from ds_cmli.models.student import Student


class GlobalContrastive(PairLoss):
    def __init__(self, config: LossConfig, student: Student, teacher_width: int | None = None):
        super().__init__(config.init_temperature, backend=config.cmli_backend)
        # A source's scale is that with which it was trained.
        if student.start is not None:
            self.temperature.logit_scale.data.fill_(student.start.log_scale)


class AllPairsCMLI(CMLILoss):
    def __init__(self, config: LossConfig, student: Student, teacher_width: int | None = None):
        super().__init__(config.cmli_init_temperature, backend=config.cmli_backend)


class GlobalSigmoid(PairLoss):
    def __init__(self, config: LossConfig, student: Student, teacher_width: int | None = None):
        bias = config.init_bias
        if bias is None and student.start is not None:
            bias = student.start.bias
        if bias is None:
            bias = -10.0
        # SigLIP's initial values: a scale of 10, and a bias with which the many negatives start
        # with a small loss.
        super().__init__(0.1, bias, MAX_SIGMOID_SCALE, backend=config.cmli_backend)
        # The scale is written afterwards: a source's may be above the maximum.
        if student.start is not None:
            self.temperature.logit_scale.data.fill_(student.start.log_scale)


class CMLISigmoid(CMLILoss):
    def __init__(self, config: LossConfig, student: Student, teacher_width: int | None = None):
        # A CMLI score is a mean of maxima: it varies less than a cosine and is above 0 for almost
        # any pair. A larger scale and a lower bias than SigLIP's make the negatives of an untrained
        # student start near SigLIP's logit of -10.
        bias = -14.0 if config.init_bias is None else config.init_bias
        super().__init__(0.02, init_bias=bias, backend=config.cmli_backend)
