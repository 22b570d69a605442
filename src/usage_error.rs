//! A wrong command line, said in one line with the nearest right word.

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory};

use crate::cli::Cli;
use crate::nearest::nearest;

/// Exit code for a command line that is not understood.
pub(crate) const EXIT_CODE: u8 = 2;

/// Describes `error` in one line. `words` is the command line that caused it.
pub(crate) fn describe(error: &clap::Error, words: &[String]) -> String {
    let root = Cli::command();
    let wrong = error.get(ContextKind::InvalidArg).map(ToString::to_string).unwrap_or_default();
    // What stands before the command does not belong to it.
    let mut before =
        words.iter().skip(1).take_while(|word| wrong.is_empty() || !word.starts_with(&wrong));
    let command = before.find_map(|word| root.find_subcommand(word));
    let called = command.map_or("mixsocks".to_owned(), |c| format!("mixsocks {}", c.get_name()));
    let problem = problem(error, &root, command);
    format!("{problem} (see `{called} --help`)")
}

fn problem(error: &clap::Error, root: &Command, command: Option<&Command>) -> String {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        Some(ContextValue::Strings(texts)) => texts.join(" and "),
        _ => String::new(),
    };
    let argument = context(ContextKind::InvalidArg);
    let value = context(ContextKind::InvalidValue);
    match error.kind() {
        ErrorKind::InvalidSubcommand => {
            unknown_command(&context(ContextKind::InvalidSubcommand), root)
        }
        ErrorKind::UnknownArgument => unknown_option(&argument, root, command),
        ErrorKind::InvalidValue if value.is_empty() => format!("{argument} needs a value"),
        ErrorKind::InvalidValue | ErrorKind::ValueValidation => {
            match std::error::Error::source(error) {
                Some(reason) if reason.to_string().contains(&value) => {
                    format!("{argument} is wrong: {reason}")
                }
                Some(reason) => format!("{argument}: {value:?} is wrong: {reason}"),
                None => format!("{argument}: {value:?} is wrong"),
            }
        }
        ErrorKind::MissingRequiredArgument => match error.get(ContextKind::InvalidArg) {
            Some(ContextValue::Strings(several)) if several.len() > 1 => {
                format!("{argument} are missing")
            }
            _ => format!("{argument} is missing"),
        },
        ErrorKind::ArgumentConflict => {
            let other = context(ContextKind::PriorArg);
            if other.is_empty() || other == argument {
                format!("{argument} is given twice")
            } else {
                format!("{argument} and {other} exclude each other")
            }
        }
        _ => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            first.strip_prefix("error: ").unwrap_or(first).to_owned()
        }
    }
}

fn unknown_command(word: &str, root: &Command) -> String {
    let names: Vec<_> = root.get_subcommands().map(Command::get_name).collect();
    match nearest(word, names.iter().copied()) {
        Some(name) => format!("there is no command {word:?}; did you mean {name:?}?"),
        None => format!("there is no command {word:?}; there are {}", names.join(", ")),
    }
}

fn unknown_option(argument: &str, root: &Command, command: Option<&Command>) -> String {
    let word = argument.split('=').next().unwrap_or_default();
    match command {
        Some(command) => unknown_word(word, &options(command, root)),
        None => unknown_before_the_command(word, root),
    }
}

/// There, an option that belongs to a command is what was meant most likely.
fn unknown_before_the_command(word: &str, root: &Command) -> String {
    let own = options(root, root);
    let of_commands = root.get_subcommands().flat_map(|command| options(command, root));
    let all: Vec<String> = own.iter().cloned().chain(of_commands).collect();
    let is_known = all.iter().any(|option| option == word);
    let meant = if is_known { Some(word) } else { nearest(word, all.iter().map(String::as_str)) };
    let of = |option: &str| {
        let has = |command: &&Command| options(command, root).iter().any(|own| own == option);
        root.get_subcommands().find(has).map_or("up", Command::get_name)
    };
    match meant {
        Some(option) if word.starts_with('-') && !own.iter().any(|own| own == option) => {
            let place = format!("after the command, as in `mixsocks {} {option} …`", of(option));
            if is_known {
                format!("{word} goes {place}")
            } else {
                format!("there is no option {word}; did you mean {option}? It goes {place}")
            }
        }
        _ => unknown_word(word, &own),
    }
}

fn unknown_word(word: &str, options: &[String]) -> String {
    if !word.starts_with('-') {
        return format!("{word:?} is not expected here");
    }
    match nearest(word, options.iter().map(String::as_str)) {
        Some(option) => format!("there is no option {word}; did you mean {option}?"),
        None => format!("there is no option {word}"),
    }
}

/// The long options of a command, those of all commands included.
fn options(command: &Command, root: &Command) -> Vec<String> {
    let global = root.get_arguments().filter(|argument| argument.is_global_set());
    let names = command.get_arguments().chain(global).filter_map(clap::Arg::get_long);
    // These two are clap's own.
    let version = command.get_version().map(|_| "version");
    names.chain(["help"]).chain(version).map(|name| format!("--{name}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(words: &[&str]) -> String {
        let words: Vec<String> =
            ["mixsocks"].iter().chain(words).map(|word| (*word).to_owned()).collect();
        describe(&Cli::from_words(words.iter().map(Into::into)).unwrap_err(), &words)
    }

    #[test]
    fn each_mistake_is_one_line_that_names_what_is_right() {
        for (words, expected) in [
            (&["up", "--sokcs", "127.0.0.1:1"][..], "did you mean --socks?"),
            (&["up", "--data"], "did you mean --data-dir?"),
            (&["up", "--quite"], "did you mean --quiet?"),
            (&["up", "--xyzzy=1"], "no option --xyzzy (see `mixsocks up --help`)"),
            (&["pu"], "did you mean \"up\"?"),
            (&["frobnicate"], "there are up, client, bench"),
            (&["--allow-private", "up"], "as in `mixsocks up --allow-private"),
            (&["--topology", "x", "client"], "as in `mixsocks client --topology"),
            (&["--sokcs", "127.0.0.1:1", "up"], "did you mean --socks? It goes after the command"),
            (&["--secnods", "1", "bench"], "as in `mixsocks bench --seconds"),
            (&["--verson"], "did you mean --version?"),
            (&["--xyzzy", "up"], "no option --xyzzy (see `mixsocks --help`)"),
            (&["up", "--version"], "no option --version"),
            (&["up", "stray"], "\"stray\" is not expected here"),
            (&["up", "--socks", "1080"], "such as 127.0.0.1:1080"),
            (&["up", "--socks"], "--socks <ADDR:PORT> needs a value"),
            (&["up", "--mean-delay", "15"], "such as 15ms"),
            (&["up", "--mean-delay", "11s"], "longer than 10s"),
            (&["up", "--profile", "private"], "only the profile \"fast\""),
            (&["client"], "--topology <FILE> and --authority <KEY> are missing"),
            (&["client", "--topology", "x"], "--authority <KEY> is missing"),
            (&["client", "--mean-delay", "1ms"], "there is no option --mean-delay"),
            (&["client", "--provider", "a@b"], "<identity>.<encryption>@<gateway identity>"),
            (&["up", "-v", "-q"], "--quiet and --verbose exclude each other"),
            (&["bench", "--socks", "[::1]:1", "--mean-delay", "0"], "exclude each other"),
            (&["bench", "--seconds", "0"], "1..=600"),
        ] {
            let line = line(words);
            assert!(line.contains(expected), "{words:?}: {line}");
            assert!(!line.contains('\n') && line.contains("--help"), "{words:?}: {line}");
        }
    }
}
