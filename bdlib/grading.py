"""A step of nbgrader's autograde beside its own: build/student/course/nbgrader_config.py names it."""

from nbgrader.preprocessors import NbGraderPreprocessor
from traitlets import Integer


class LimitCharacters(NbGraderPreprocessor):
    """Cuts what a cell printed to so many characters: nbgrader's own LimitOutput counts lines, and one line can hold 100 MB."""

    max_characters = Integer(50_000, help="characters of printed output that are kept of each cell").tag(config=True)

    def preprocess_cell(self, cell, resources, cell_index):
        """The cell and resources, as nbconvert wants them."""
        left = self.max_characters
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                if len(output.text) > left:
                    output.text = output.text[:left] + "\n... cut here ...\n"
                left = max(0, left - len(output.text))
        return cell, resources
