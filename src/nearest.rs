//! The nearest right word for a wrong one.

/// The candidate that was most likely meant by `word`, if any is close.
///
/// Close means a continuation of the word (`--data` for `--data-dir`), or at most one slip of the
/// fingers (a letter too many, missing, wrong, or two swapped) per three letters.
pub(crate) fn nearest<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    const LONGEST_WORD: usize = 64; // The comparison is quadratic.
    let length = word.chars().count();
    if length > LONGEST_WORD {
        return None;
    }
    candidates
        .into_iter()
        .map(|candidate| {
            let continues = length >= 2 && candidate.starts_with(word);
            let slips = if continues { 0 } else { strsim::damerau_levenshtein(word, candidate) };
            (slips, candidate)
        })
        .filter(|(slips, _)| *slips <= length.div_ceil(3))
        .min_by_key(|(slips, _)| *slips)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_and_beginnings_are_understood_and_strangers_are_not() {
        let words = ["up", "client", "bench"];
        for (wrong, right) in [
            ("pu", Some("up")),
            ("cl", Some("client")),
            ("cleint", Some("client")),
            ("bnch", Some("bench")),
            ("directory", None),
            ("", None),
        ] {
            assert_eq!(nearest(wrong, words), right, "{wrong}");
        }
        assert_eq!(nearest(&"b".repeat(100_000), words), None);
    }
}
