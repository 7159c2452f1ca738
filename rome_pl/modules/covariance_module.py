"""The LightningModule that computes second moments: one batch is one block of text."""

from typing import Literal

from rome_pl.errors import OptionError
from rome_pl.files.whole_files import local_path
from rome_pl.model.architecture import RewriteSite, decoder_layers, find_site
from rome_pl.model.language_model import LanguageModel
from rome_pl.model.loading import DEFAULT_SOURCE
from rome_pl.model.rewrite_layers import default_layer, parse_layers
from rome_pl.modules.language_model_module import LanguageModelModule
from rome_pl.modules.trainer_checks import check_pass_trainer
from rome_pl.second_moments.corpus import Corpus
from rome_pl.second_moments.generated_corpus import GeneratedCorpus
from rome_pl.second_moments.moment_pass import KEYS_PER_DIMENSION, Finished, MomentPass, PassOptions
from rome_pl.second_moments.moment_store import artefact_path, statistics_folder, unfinished_folder
from rome_pl.second_moments.moment_sums import Place
from rome_pl.second_moments.split_half import HalfAgreement
from rome_pl.second_moments.text_blocks import Block, BlockStream
from rome_pl.utils.distributed import Peers, one_after_the_other

__all__ = ["CovarianceModule"]


class CovarianceModule(LanguageModelModule):
    """Computes ``C = E[k kᵀ]`` of any layers in one pass over text (Meng et al. 2022, Eq. 2), by ``Trainer.predict``.

    Several devices share the text; what is there already is not computed again, and an interrupted run is gone on
    with. Each step returns the :class:`HalfAgreement` that was made with it, if any.

    Args:
        pretrained: Model: hub name, folder, GGUF file or ``package:NAME/FILE``.
        dtype: Precision of its weights; ``auto`` is the checkpoint's own.
        allow_pickle: Whether weights that are not safetensors may be read.
        layers: Decoder layers, numbered from 0: ``all``, a list, or a range such as ``4-8``. ``None`` (default): the
            layer that edits of this model rewrite.
        tokens: Key vectors to sum. ``None`` (default): 30 per dimension of a key.
        block_length: Tokens of a row of text.
        stop_agreement: End earlier, where two halves of the text agree by this (mean cosine of ``C⁻¹k`` over keys of
            sample requests) at every layer; above 1 never.
        split_half: Whether to sum the text in two halves; without, memory is half and no agreement is known.
        accumulate_on: Where the sums are kept: ``device``, ``host``, or ``auto``, the device if they fit.
        layers_per_pass: Most layers in one pass over the text, to need less memory. ``None`` (default): all.
        save_every_n_tokens: Tokens between two saves of a process's unfinished sums. ``None`` (default): saving takes
            at most a twentieth of the time.
        folder: Folder for the artefacts. ``None`` (default): the cache, where edits find them.
    """

    def __init__(
        self,
        pretrained: str = DEFAULT_SOURCE,
        dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto",
        allow_pickle: bool = False,
        layers: list[int] | str | None = None,
        tokens: int | None = None,
        block_length: int = 512,
        stop_agreement: float = 0.95,
        split_half: bool = True,
        accumulate_on: Place = "auto",
        layers_per_pass: int | None = None,
        save_every_n_tokens: int | None = None,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name in ("tokens", "block_length", "layers_per_pass", "save_every_n_tokens"):
            value = self.hparams[name]
            if value is not None and value < 1:
                raise OptionError(f"{name}: expected a number from 1 on, got {value}")
        self.moments: MomentPass | None = None

    @property
    def finished(self) -> list[Finished]:
        """The second moments that were found or computed so far, by layer."""
        return sorted(self.moments.finished, key=lambda done: done.layer) if self.moments is not None else []

    @property
    def history(self) -> list[list[HalfAgreement]]:
        """What was found at each meeting of each pass."""
        return self.moments.history if self.moments is not None else []

    def setup(self, stage: str) -> None:
        """Check how the Trainer is set.

        Raises:
            OptionError: With the setting that works.
        """
        if stage != "predict":
            raise OptionError(f"second moments are computed by Trainer.predict, not by {stage}")
        check_pass_trainer(self.trainer)

    def begin(self, corpus: Corpus | None, seed: int = 0) -> BlockStream:
        """Prepare the pass over a corpus; the data module asks for it.

        Args:
            corpus: The text; ``None`` lets the model write it.
            seed: Seed of that.

        Returns:
            This process's share of the blocks.

        Raises:
            OptionError: If a layer does not exist.
            StatisticsError: If memory is too small, or another run computes the same.
        """
        if self.moments is not None:
            self.moments.close()
        language_model, hparams = self._language_model, self.hparams
        sites = self.sites()
        options = PassOptions(
            tokens=hparams["tokens"],
            block_length=hparams["block_length"],
            stop_agreement=hparams["stop_agreement"],
            split_half=hparams["split_half"],
            accumulate_on=hparams["accumulate_on"],
            layers_per_pass=hparams["layers_per_pass"],
            save_every=hparams["save_every_n_tokens"],
        )
        if corpus is None:
            wanted = options.tokens or KEYS_PER_DIMENSION * max(site.least_text for site in sites)
            text = GeneratedCorpus.of(language_model, wanted, seed)
            with one_after_the_other(self.trainer):
                text.write(language_model)
            corpus = text
        folder = local_path(hparams["folder"]) if hparams["folder"] else statistics_folder()
        device = self.trainer.strategy.root_device
        self.moments = MomentPass(
            language_model,
            sites,
            corpus,
            options,
            lambda site: artefact_path(folder, language_model, site, corpus, options),
            unfinished_folder(folder),
            Peers(self.trainer.global_rank, self.trainer.world_size, device),
        )
        return self.moments.blocks()

    def sites(self) -> list[RewriteSite]:
        """The projections of the layers asked for.

        Raises:
            OptionError: If a layer does not exist, or ``layers`` is neither a list nor a range.
        """
        model = self._language_model.model
        depth = len(decoder_layers(model)[1])
        wanted = self.hparams["layers"]
        if wanted is None:
            wanted = [default_layer(model.config.get_text_config(decoder=True))]
        return [find_site(model, layer) for layer in parse_layers(wanted, depth)]

    def predict_step(self, batch: Block, batch_idx: int) -> HalfAgreement | bool:
        """Sum one block; the result is what was found if processes met, and ``False`` otherwise."""
        assert self.moments is not None
        return self.moments.step(batch) or False

    def teardown(self, stage: str) -> None:
        """Let other runs have the job; sums that are not finished stay for a later run."""
        if self.moments is not None:
            self.moments.close()

    def _adopt(self, language_model: LanguageModel) -> None:
        super()._adopt(language_model)
        language_model.remember_weights()
