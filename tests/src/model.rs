//! Parsers that are obviously right: slow, on numbers of any length, and
//! written after the RFC's text, not after our code. Tests compare.

/// First, last (included) and total of a Content-Range, as far as each is given.
pub type ContentRange = (Option<u128>, u128, Option<u128>);

/// Longest number that is read; longer ones stand for "more than anything".
const DIGITS_MAX: usize = 30;

/// A run of digits; `None` for anything else.
pub fn digits(text: &str) -> Option<u128> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    match text.trim_start_matches('0') {
        "" => Some(0),
        significant if significant.len() > DIGITS_MAX => Some(u128::MAX / 2),
        significant => significant.parse().ok(),
    }
}

/// RFC 9110 section 14.1.2: what each range of a Range value selects of
/// `length` bytes, or nothing; `None` when the value is to be ignored.
pub fn ranges(value: &str, length: u64) -> Option<Vec<Option<(u128, u128)>>> {
    let (unit, list) = value.split_once('=')?;
    let items: Vec<&str> = list
        .split(',')
        .map(|item| item.trim_matches([' ', '\t']))
        .filter(|item| !item.is_empty())
        .collect();
    if !unit.eq_ignore_ascii_case("bytes") || items.is_empty() {
        return None;
    }
    let length = u128::from(length);
    let mut ranges = Vec::new();
    for item in items {
        let (first, last) = item.split_once('-')?;
        let (start, end) = match (first, last) {
            ("", count) => (length.saturating_sub(digits(count)?), length),
            (first, "") => (digits(first)?, length),
            (first, last) => {
                let (first, last) = (digits(first)?, digits(last)?);
                // What is beyond 2^64 is one number to us: no order among those.
                let most = u128::from(u64::MAX);
                if last.min(most) < first.min(most) {
                    return None;
                }
                (first, (last + 1).min(length))
            }
        };
        ranges.push((start < end).then_some((start, end)));
    }
    Some(ranges)
}

/// RFC 9110 section 14.4, for numbers below 2^64, of objects that have at most
/// 2^64 - 1 bytes; `None` unless well-formed and consistent in itself.
pub fn content_range(value: &str) -> Option<ContentRange> {
    let number = |text: &str| digits(text).filter(|number| *number <= u128::from(u64::MAX));
    let (unit, rest) = value.trim().split_once(' ')?;
    let (range, total) = rest.split_once('/')?;
    let total = match total {
        "*" => None,
        total => Some(number(total)?),
    };
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    if range == "*" {
        return Some((None, 0, total));
    }
    let (first, last) = range.split_once('-')?;
    let (first, last) = (number(first)?, number(last)?);
    let most = u128::from(u64::MAX);
    let consistent = first <= last && last < total.unwrap_or(most);
    consistent.then_some((Some(first), last, total))
}

/// What `${NAME}` and `${NAME:-default}` become; `None` where that is refused.
pub fn expanded(text: &str, env: impl Fn(&str) -> Option<String>) -> Option<String> {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::new();
    let mut at = 0;
    while at < chars.len() {
        if chars[at..].starts_with(&['$', '$', '{']) {
            out.push_str("${");
            at += 3;
        } else if chars[at..].starts_with(&['$', '{']) {
            let close = at + chars[at..].iter().position(|c| *c == '}')?;
            let inside: String = chars[at + 2..close].iter().collect();
            let (name, default) = match inside.find(":-") {
                Some(colon) => (&inside[..colon], Some(&inside[colon + 2..])),
                None => (inside.as_str(), None),
            };
            let mut letters = name.chars();
            let is_letter = |c: char| c.is_ascii_alphabetic() || c == '_';
            let is_name = letters.next().is_some_and(is_letter)
                && letters.all(|c| is_letter(c) || c.is_ascii_digit());
            if !is_name {
                return None;
            }
            let value = match (env(name), default) {
                (Some(value), Some(default)) if value.is_empty() => default.to_owned(),
                (Some(value), _) => value,
                (None, default) => default?.to_owned(),
            };
            out.push_str(&value);
            at = close + 1;
        } else {
            out.push(chars[at]);
            at += 1;
        }
    }
    Some(out)
}

/// A size in bytes, of any magnitude.
pub fn size(text: &str) -> Option<u128> {
    let (number, unit) = number_and_unit(text)?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" | "ib" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    Some(number << shift)
}

/// A duration in milliseconds, of any magnitude.
pub fn duration_ms(text: &str) -> Option<u128> {
    let (number, unit) = number_and_unit(text)?;
    let ms = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    Some(number * ms)
}

/// The digits in front, at most 2^64, and what follows them and white space.
fn number_and_unit(text: &str) -> Option<(u128, &str)> {
    let end = text.bytes().take_while(u8::is_ascii_digit).count();
    let number = digits(&text[..end])?;
    (number <= u128::from(u64::MAX)).then_some((number, text[end..].trim_start()))
}
