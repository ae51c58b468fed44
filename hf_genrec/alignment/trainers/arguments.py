"""RecommenderTrainingArguments: transformers' TrainingArguments with the defaults and options of next-item training."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from hf_genrec.errors import TrainingError

from .callbacks import GuardFields, check_guard_options


@dataclass
class RecommenderTrainingArguments(GuardFields, TrainingArguments):
    """Arguments of RecommenderTrainer. All of transformers' apply; these defaults differ and these options are new.

    Evaluation and saving happen per epoch, the best checkpoint by NDCG@10 is loaded at the end, batches are bucketed by
    length, nothing is reported to outside services, and a loss that is not finite stops the run.

    Raises:
        TrainingError: Options that contradict each other; the message names the fields.
    """

    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warm-up."})
    warmup_steps: float = field(default=50, metadata={"help": "Warm-up steps; below 1 a share of all steps."})
    num_train_epochs: float = field(default=20.0, metadata={"help": "Passes over the training set."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows (windows or prefixes) per step."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Users ranked together."})
    logging_steps: float = field(default=50, metadata={"help": "Log the loss every so many steps."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to rank the validation targets."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save; must match eval_strategy."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept: the best and the newest."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(default="ndcg@10", metadata={"help": "recall@K, ndcg@K or loss."})
    greater_is_better: bool | None = field(default=None, metadata={"help": "Follows from the metric when not given."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length: batches of similar length; or random."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 (the order that HfArgumentParser understands)
        default="none", metadata={"help": "Experiment trackers."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Our collators name what they need."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Always off: such a loss stops the run."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Pinned host memory (only with a GPU)."}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Early stopping and time budget go on where they were."}
    )

    max_history: int = field(default=50, metadata={"help": "Newest items of a history that the model reads."})
    samples_per_epoch: int | None = field(
        default=None, metadata={"help": "Encoder-decoder models: draw so many prefixes per epoch; None: all."}
    )
    eval_ks: list[int] = field(default_factory=lambda: [5, 10, 20], metadata={"help": "Cut-offs of the metrics."})
    eval_num_beams: int = field(default=20, metadata={"help": "Beams of the validation search (at least max eval_ks)."})
    eval_exclude_seen: bool = field(default=True, metadata={"help": "Rank without the items of the user's history."})
    eval_users: int | None = field(default=None, metadata={"help": "Rank a fixed random part of the users; None: all."})
    ema_decay: float | None = field(
        default=None, metadata={"help": "Validate and keep the moving average of the weights (0.99 to 0.999)."}
    )

    def __post_init__(self) -> None:
        self.logging_nan_inf_filter = False
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            self.load_best_model_at_end, self.metric_for_best_model = False, None
        super().__post_init__()
        self._check_options()

    def _check_options(self) -> None:
        self.eval_ks = sorted({int(k) for k in self.eval_ks})
        positive = (
            "max_history",
            "eval_num_beams",
            "eval_users",
            "samples_per_epoch",
        )
        for name in positive:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if not self.eval_ks or self.eval_ks[0] < 1:
            raise TrainingError(f"eval_ks is {self.eval_ks}: give cut-offs of at least 1, such as 5 10 20.")
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        name, _, k = metric.partition("@")
        if name in ("recall", "ndcg") and (not k.isdigit() or int(k) not in self.eval_ks):
            raise TrainingError(
                f"metric_for_best_model is {metric}, but eval_ks is {self.eval_ks}: add its K to eval_ks."
            )
        check_guard_options(self)
        if self.label_smoothing_factor:
            raise TrainingError(
                f"label_smoothing_factor is {self.label_smoothing_factor}: Trainer would smooth over the whole "
                "vocabulary and shift by one token, which fits no model of item codes; leave it at 0."
            )
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise TrainingError(f"ema_decay is {self.ema_decay}: it must be in [0, 1), such as 0.995.")

    @property
    def eval_top_k(self) -> int:
        """Length of the ranked lists: the largest cut-off."""
        return max(self.eval_ks)
